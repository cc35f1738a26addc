"""Encodings are named by the letters of a language; formats by their first bytes."""

import pytest

from tale_jax.data.encodings import LANGUAGES, encoding_of, format_of, is_binary, wide_encoding_of

TEXT = {
    "German": "Der Bär ging über die Brücke, und die schöne Königin grüßte ihn fröhlich. Äpfel, Öl und Übermut! ",
    "French": "L’été, le garçon mangeait des pâtes à la crème brûlée « déjà vu » – c’était très drôle, où ça? ",
    "Spanish": "¿Dónde está el niño? El pingüino comió allí; mañana también habrá más corazón. ¡Qué alegría! ",
    "English": "It’s 5 o’clock — “no”, he said… The café’s façade was naïve. ",
    "Polish": "Zażółć gęślą jaźń. Książę powiedział, że jeździł na łące; wszyscy śmiali się głośno. ",
    "Czech": "Příliš žluťoučký kůň úpěl ďábelské ódy. Byl jednou jeden král, který měl tři syny. ",
    "Hungarian": "Árvíztűrő tükörfúrógép. Volt egyszer egy öreg király, akinek három gyönyörű leánya volt. ",
    "Russian": "Жили-были старик со старухой у самого синего моря. Съешь ещё этих мягких булок. ",
    "Ukrainian": "Жила собі дівчинка, і їй дуже хотілося мати ґудзик; є в неї кіт і щеня. ",
    "Greek": "Μια φορά κι έναν καιρό ήταν ένας βασιλιάς που είχε τρεις κόρες και ένα μεγάλο παλάτι. ",
    "Turkish": "Bir varmış bir yokmuş; çok güzel bir şehirde yaşayan küçük bir kız uyuyordu. İyi günler! ",
    "Hebrew": "היה היה פעם מלך שהיו לו שלוש בנות יפות מאוד והוא אהב אותן. ",
    "Arabic": "كان يا ما كان في قديم الزمان ملك له ثلاث بنات جميلات. ",
    "Thai": "กาลครั้งหนึ่งนานมาแล้ว มีพระราชาองค์หนึ่งมีธิดาสามองค์ ",
    "Japanese": "昔々、あるところにおじいさんとおばあさんが住んでいました。おじいさんは山へ芝刈りに行きました。",
    "Chinese": "从前有一个国王，他有三个女儿。最小的女儿非常美丽，连太阳都感到惊讶。",
    "Taiwanese": "從前有一個國王，他有三個女兒。最小的女兒非常美麗，連太陽都感到驚訝。",
    "Korean": "옛날 옛적에 한 왕이 있었는데 그에게는 세 딸이 있었습니다. 막내딸은 매우 아름다웠습니다. ",
}
ENCODINGS = {
    "German": "cp1252 latin-1 cp850 mac-roman",
    "French": "cp1252 mac-roman cp850",
    "Spanish": "cp1252 latin-1 cp850 mac-roman",
    "English": "cp1252 mac-roman",
    "Polish": "cp1250 iso8859-2 cp852",
    "Czech": "cp1250 iso8859-2",
    "Hungarian": "cp1250 iso8859-2",
    "Russian": "cp1251 koi8-r cp866 iso8859-5",
    "Ukrainian": "cp1251 koi8-u",
    "Greek": "cp1253 iso8859-7",
    "Turkish": "cp1254 iso8859-9",
    "Hebrew": "cp1255",
    "Arabic": "cp1256",
    "Thai": "cp874",
    "Japanese": "shift_jis euc_jp",
    "Chinese": "gb18030 gbk",
    "Taiwanese": "big5",
    "Korean": "euc_kr cp949",
}
PAIRS = [(language, encoding) for language, names in ENCODINGS.items() for encoding in names.split()]


@pytest.mark.parametrize(("language", "encoding"), PAIRS)
@pytest.mark.parametrize("times", [1, 300])
def test_the_encoding_named_gives_the_text(language, encoding, times):
    data = (TEXT[language] * times).encode(encoding, "ignore")
    found = encoding_of(data)
    assert found and data.decode(found) == data.decode(encoding)


def test_bytes_that_are_no_language_have_no_encoding():
    assert encoding_of(bytes(range(128, 256)) * 20) == ""
    assert encoding_of(b"plain ASCII") == ""


@pytest.mark.parametrize("language", TEXT)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_are_known_without_a_mark(language, encoding):
    assert wide_encoding_of((TEXT[language] + "\n").encode(encoding) * 40) == encoding


def test_narrow_text_is_not_wide_and_not_binary():
    for language, encoding in PAIRS:
        data = TEXT[language].encode(encoding, "ignore")
        assert wide_encoding_of(data) == ""
        assert not is_binary(data)
    assert is_binary(bytes(range(1, 32)) * 9)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"%PDF-1.7", "PDF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"PK\x03\x04" + bytes(26) + b"word/document.xml", "Word"),
        (b"PK\x03\x04" + bytes(26) + b"mimetypeapplication/epub+zip", "EPUB"),
        (b"PK\x03\x04" + bytes(26) + b"a.txt", "zip"),
        (bytes(257) + b"ustar", "tar"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"\xef\xbb\xbf\n <!-- x -->\n<!doctype HTML>", "HTML"),
        (b"<html lang='en'>", "HTML"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC>', "HTML"),
    ],
)
def test_formats_by_their_first_bytes(head, name):
    found = format_of(head)
    assert found and name in found[0]


@pytest.mark.parametrize("head", [b"", b"PK is a word", b"<htmlish>", b"The <html> tag", b"BM", b"GIF is a format"])
def test_text_that_only_looks_like_a_format(head):
    assert format_of(head) is None


def test_every_candidate_is_a_codec_of_python():
    assert all("x".encode(encoding) for _, encodings in LANGUAGES for encoding in encodings)
