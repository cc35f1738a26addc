"""Bytes that are no UTF-8 text: what they are, in words, and what turns them into it.

A file that a program calls `.txt` may be UTF-16, in the code page of an old Windows, compressed, or a picture. Formats
are known by their first bytes. 8-bit and East Asian encodings have no such mark: each candidate decodes the bytes, and
the one wins whose letters are those of a language that is written in it. (charset-normalizer 3.5, tried first, named 16
of 50 samples wrongly, among them Greek and Turkish code pages as ISO 8859-10 and Japanese as Korean.)

    format_of(head)        # ("a PDF", "pdftotext {file} {new}.txt") or None
    encoding_of(data)      # "cp1251", or "" where nothing fits
"""

import codecs
import re
import unicodedata
from collections.abc import Iterator

SAMPLE_BYTES = 1 << 16  # of a file, looked at before it is decoded
SCORED_BYTES = 1 << 14  # enough to tell one encoding from another

# How a file of each format begins, what it is, and what makes text of it. {file} is quoted for a shell.
FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer in place of the file", "run: git lfs pull"),
    (b"\x1f\x8b", "compressed with gzip", "mv {file} {file}.gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "mv {file} {file}.zst"),
    (b"BZh", "compressed with bzip2", "mv {file} {file}.bz2"),
    (b"\xfd7zXZ\x00", "compressed with xz", "mv {file} {file}.xz"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z e -so {file} > {new}"),
    (b"Rar!\x1a\x07", "a RAR archive", "unrar p -inul {file} > {new}"),
    (b"%PDF-", "a PDF", "pdftotext {file} {new}"),
    (b"{\\rtf", "an RTF document", "pandoc -f rtf -t plain {file} -o {new}"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "antiword {file} > {new}"),
    (b"PAR1", "a parquet table", "mv {file} {file}.parquet"),
    (b"SQLite format 3\x00", "a SQLite database", ""),
    (b"\x89PNG\r\n\x1a\n", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GIF87a", "a GIF picture", ""),
    (b"GIF89a", "a GIF picture", ""),
    (b"RIFF", "a sound, film or picture (RIFF)", ""),
    (b"OggS", "a sound or film (Ogg)", ""),
    (b"ID3", "a sound (MP3)", ""),
    (b"fLaC", "a sound (FLAC)", ""),
    (b"\x7fELF", "a program", ""),
    (b"MZ\x90\x00", "a program", ""),
    (b"ARROW1\x00\x00", "an Arrow table", ""),
    (b"\x93NUMPY", "an array of numpy", ""),
)
ZIP_CONTENTS = (
    (b"word/", "a Word document", "pandoc -f docx -t plain {file} -o {new}"),
    (b"application/epub", "an EPUB book", "pandoc -f epub -t plain {file} -o {new}"),
    (b"opendocument.text", "an OpenDocument text", "pandoc -f odt -t plain {file} -o {new}"),
    (b"xl/", "an Excel table", "save it as CSV"),
)
_HTML = re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*<(!doctype\s+html|html)\b", re.IGNORECASE | re.DOTALL)
BOMS = (  # UTF-32 first: its little-endian mark begins as that of UTF-16 does
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# Letters beyond ASCII that are frequent in a language, and the encodings it is written in, the likeliest first.
_WEST = ("cp1252", "latin-1", "mac-roman", "cp850", "cp437")
_CENTRAL = ("cp1250", "iso8859-2", "cp852")
_CYRILLIC = ("cp1251", "koi8-r", "koi8-u", "iso8859-5", "cp866", "mac-cyrillic")
LANGUAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("äöüß", _WEST),
    ("éèàçêâîôùûœëï", _WEST),
    ("áéíóúñü¿¡", _WEST),
    ("ãõçáéíóúâêôà", _WEST),
    ("àèéìòù", _WEST),
    ("åäöæøé", _WEST),
    ("áðéíóúýþæö", _WEST),
    ("ąćęłńóśźż", _CENTRAL),
    ("áčďéěíňóřšťúůýž", _CENTRAL),
    ("áäčďéíĺľňóôŕšťúýž", _CENTRAL),
    ("áéíóöőúüű", _CENTRAL),
    ("čćđšž", _CENTRAL),
    ("ăâîșțşţ", _CENTRAL),
    ("çğıöşüâî", ("cp1254", "iso8859-9", "cp857")),
    ("ąčęėįšųūž", ("cp1257", "iso8859-13")),
    ("āčēģīķļņšūž", ("cp1257", "iso8859-13")),
    ("õäöüšž", ("cp1257",)),
    ("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфёъ", _CYRILLIC),
    ("оаинтевсрлкудмпзяьбгчхцжйюєіїґшщф", ("cp1251", "koi8-u")),
    ("αοιεντσςηυρπκμλωγδθχφβξζάέήίόύώψϊ", ("cp1253", "iso8859-7", "cp737")),
    ("יוהלאתרבמשםנכעקדחפןצטגזסךץף", ("cp1255", "iso8859-8", "cp862")),
    ("اليمونرتبةعدسفهكقحجشصطخأذضىثئزغظءإآ", ("cp1256", "iso8859-6")),
    ("ากนรอเงมยลวดทสตะปบคหแจพชขใไโ่้์ัิีึืุู็ำ", ("cp874",)),
)
_KANA = re.compile("[\u3040-\u30ff]")
_IDEOGRAPH = re.compile("[\u4e00-\u9fff]")
_HANGUL = re.compile("[\uac00-\ud7a3]")
EAST_ASIAN: tuple[tuple[str, tuple[str, ...]], ...] = (  # frequent characters
    ("のにはをたがでてとしれさいるなもかんまこりすっあ", ("shift_jis", "cp932", "euc_jp", "iso2022_jp")),
    ("的一是了不在有人这个上我大来们他到说就要地为子中你出时过和", ("gb18030",)),
    ("的一是了不在有人這個上我大來們他到說就要地為子中你出時過和", ("big5", "cp950")),
    ("이다는의에가을를은고하지나도한기로어사자그리서라아", ("euc_kr", "cp949", "johab")),
)
_QUOTES = "’‘“”„‚»«–—…·•°§©®™€£\u00a0"  # in all languages
MIN_SCORE = 0.6
HTML_REMEDY = "download it again, or, to learn from HTML, put a line of text before it"


def format_of(head: bytes) -> tuple[str, str] | None:
    """What a file that begins with `head` is, and what to do about it ("": nothing makes text of it)."""
    for magic, name, command in FORMATS:
        if head.startswith(magic):
            return name, command
    if head.startswith(b"PK\x03\x04"):
        for mark, name, command in ZIP_CONTENTS:
            if mark in head:
                return name, command
        return "a zip archive", "unzip -p {file} > {new}"
    if head[257:262] == b"ustar":
        return "a tar archive", "tar -xOf {file} > {new}"
    if _HTML.match(head.removeprefix(codecs.BOM_UTF8)):
        return "an HTML page, perhaps an error page saved in place of the text", HTML_REMEDY
    return None


def bom_of(head: bytes) -> str:
    """The encoding whose byte-order mark `head` begins with; "" without one."""
    return next((encoding for mark, encoding in BOMS if head.startswith(mark)), "")


def wide_encoding_of(data: bytes) -> str:
    """UTF-16 or UTF-32 without a byte-order mark, told by where its NUL bytes are; "" for anything else."""
    data = data[: len(data) // 4 * 4]
    counts = [data[place::4].count(0) for place in range(4)]
    quarter = len(data) // 4
    if not quarter or not sum(counts):
        return ""
    for encoding, empty in (("utf-32-le", (2, 3)), ("utf-32-be", (0, 1))):
        if all(counts[place] > 0.9 * quarter for place in empty) and _decodes_to_text(data, encoding):
            return encoding
    frequent = {encoding: _share_of_frequent(data, encoding) for encoding in ("utf-16-le", "utf-16-be")}
    best, other = sorted(frequent, key=lambda encoding: -frequent[encoding])
    found = frequent[best] > 0.02 and frequent[best] > 2 * frequent[other] and _decodes_to_text(data, best)
    return best if found else ""


_FREQUENT = set(" \t\r\n.,;:!?\"'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789，。、！？「」　")


def _share_of_frequent(data: bytes, encoding: str) -> float:
    text = data.decode(encoding, "replace")
    return sum(map(_FREQUENT.__contains__, text)) / len(text)


def _decodes_to_text(data: bytes, encoding: str) -> bool:
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return False
    return bool(text) and sum(map(_is_odd, text)) < 0.02 * len(text)


def _is_odd(character: str) -> bool:
    """Whether a character stands in no text: a control character, an unassigned one, one of private use."""
    return character not in "\t\n\r\f\v\x1b" and unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs")


def is_binary(data: bytes) -> bool:
    """Whether bytes without NULs are still no text in any encoding: too many control characters."""
    controls = sum(data.count(byte) for byte in range(32) if byte not in b"\t\n\r\f\v\x1b\x0e\x0f")
    return controls > 0.02 * len(data)


def encoding_of(data: bytes) -> str:
    """The encoding, other than Unicode's, that bytes are probably in; "" where none fits.

    Args:
      data: from the start of a line on, `SCORED_BYTES` are enough; the last character may be cut.
    """
    best, best_score = "", MIN_SCORE
    for encoding, score in _scores(data[:SCORED_BYTES]):
        if score > best_score + 1e-9:
            best, best_score = encoding, score
    return best


def _scores(data: bytes) -> Iterator[tuple[str, float]]:
    texts: dict[str, str] = {}
    for letters, encodings in LANGUAGES:
        for encoding in encodings:
            if (text := _decoded(data, encoding, texts)) is not None:
                yield encoding, _alphabet_score(text, letters)
    for frequent, encodings in EAST_ASIAN:
        for encoding in encodings:
            if (text := _decoded(data, encoding, texts)) is not None:
                yield encoding, _east_asian_score(text, frequent)


def _decoded(data: bytes, encoding: str, texts: dict[str, str]) -> str | None:
    try:
        if encoding not in texts:
            texts[encoding] = codecs.getincrementaldecoder(encoding)().decode(data)
        return texts[encoding]
    except UnicodeDecodeError:
        return None


def _alphabet_score(text: str, letters: str) -> float:
    """How well the characters beyond ASCII are those of a language: 1 when all are, less for what stands oddly."""
    total, score = 0, 0.0
    rare = letters[len(letters) // 2 :] if len(letters) > 20 else ""  # of a whole alphabet, by frequency
    latin = not unicodedata.name(letters[0]).startswith(("CYR", "GREEK", "HEBREW", "ARABIC", "THAI"))
    for match in re.finditer(r"[^\x00-\x7f]", text):
        character, place = match.group(), match.start()
        before, after = text[place - 1 : place], text[place + 1 : place + 2]
        total += 1
        if character in _QUOTES:
            inside = before.isalpha() and after.isalpha() and character not in "’–—·"
            score += -1 if inside else 1
        elif character in letters:
            beside_other = not latin and (before + after).isascii() and (before + after).isalpha()
            score += -1 if beside_other else 0.8 if character in rare else 1
        elif character.lower() in letters:
            score += -1 if before.islower() else 0.7  # a capital inside a word
        elif not character.isalpha():
            score -= 1
    return score / total if total else 0.0


def _east_asian_score(text: str, frequent: str) -> float:
    """The same for scripts of thousands of characters: many must be among the frequent ones."""
    wide = [character for character in text if ord(character) > 0x7F]
    if not wide:
        return 0.0
    kana, hangul = (len(pattern.findall(text)) / len(wide) for pattern in (_KANA, _HANGUL))
    ideographs = len(_IDEOGRAPH.findall(text)) / len(wide)
    punctuation = sum(character in "、。，！？「」『』：；“”‘’…—　・（）《》" for character in wide) / len(wide)
    common = sum(character in frequent for character in wide) / len(wide)
    own = hangul if _HANGUL.match(frequent) else kana + ideographs if _KANA.match(frequent) else ideographs
    return own + punctuation if common > 0.08 and own > 0.5 else 0.0
