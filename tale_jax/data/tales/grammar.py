"""The embedded corpus: short tales from a story grammar whose every probability is known.

A language model is measured by its loss, but on ordinary text nobody knows how low the loss can go. Here we do. A small
program generates the tales by random choices. A tale's words reveal each of the choices, so `log p(text)` is exact, its
mean is the entropy of the corpus, and a model's excess over it measures what is left to learn. The same program parses
a model's tales, and says whether they are our language (kind "grammar") and agree with themselves (kind "world"): who
has what, who knows what, which name, thing, place and pronoun belongs where.

How it works. `_tale` builds a story by calls of `Story.say`, each of which chooses a sentence of a scene and fillers
for its slots (they are written in `lexicon.py`). Every choice is uniform over what the story so far allows, and
no option's words begin another's. So the text is a prefix code for its choices: read from left to right, at most one
option fits, there is exactly one derivation, and `log p` is minus the sum of the logarithms of the numbers of options.
The same `_tale` generates (with a `_Generator`) and parses (with a `_Parser`), so the two cannot disagree.

A tale belongs to a split by a hash of its text, so splits cannot overlap. `logprob` is that of the whole language;
within a split every tale is likelier by one constant factor, ln(1 / share of the split) nats a tale: 0.11 for
train (less than 0.001 a token), and the same for all tales, so it moves no comparison between models.

Run `python -m tale_jax.data.tales.grammar --count 3` to read some.
"""

import argparse
import functools
import hashlib
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, no_type_check, runtime_checkable

from tale_jax.data.tales import lexicon as words

T = TypeVar("T")

SPLIT_SHARES = {"train": 18 / 20, "valid": 1 / 20, "test": 1 / 20}


@dataclass(frozen=True)
class Tale:
    """A tale and the natural logarithm of its probability in the whole language (nats)."""

    text: str
    logprob: float


@dataclass(frozen=True)
class Verdict:
    """What `judge` thinks of a text; `logprob` is in nats, and -inf for a text that is no tale."""

    accepted: bool
    kind: str  # "" when accepted, else "grammar" or "world"
    reason: str
    logprob: float


@dataclass(frozen=True)
class Entropy:
    """Monte-Carlo entropy of the tales with standard errors; a unit is what `count` counted (bytes unless told)."""

    num_tales: int
    nats_per_tale: float
    nats_per_tale_stderr: float
    nats_per_byte: float
    nats_per_byte_stderr: float
    nats_per_unit: float
    nats_per_unit_stderr: float

    @property
    def log10_tales(self) -> float:
        """Lower bound of log10 of the number of different tales: no language of K texts has entropy above ln K."""
        return (self.nats_per_tale - 4 * self.nats_per_tale_stderr) / math.log(10)


def tell(index: int, split: str = "train", seed: int = 0) -> Tale:
    """Tells tale number `index` (>= 0) of a split: the same on every machine and Python version.

    Raises ValueError for an unknown split or a negative index.
    """
    if split not in SPLIT_SHARES:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLIT_SHARES)}; use one of these")
    if index < 0:
        raise ValueError(f"index={index} must not be negative; count tales from 0")
    for tale in _tales(f"{seed}/{split}/{index}"):
        if split_of(tale.text) == split:
            return tale
    raise AssertionError("the stream of tales has no end")


def split_of(text: str) -> str:
    """The split that a tale's text belongs to, by its hash."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=b"tale split").digest()
    return {0: "valid", 1: "test"}.get(int.from_bytes(digest, "big") % 20, "train")


def judge(text: str) -> Verdict:
    """Accepts exactly the tales that `tell` can tell, with the same log-probability; else names the first thing wrong.

    kind "grammar": the words at that point are no sentence of the tales, or the text stops early or goes on too long.
    kind "world": they are a sentence of the tales, but it does not agree with what was told before.
    Works on any string, well within a millisecond or two. Space around a tale is not part of it: strip it first.
    """
    story, parser, is_told = _read(text)
    if not is_told:
        kind, reason = _explain(text, story, parser)
        return Verdict(False, kind, f"{kind}: {reason}", -math.inf)
    return Verdict(True, "", "", parser.logprob)


def retold(text: str) -> "Story":
    """The cast and the world of a tale, when it has been told. Raises ValueError for a text that is no tale."""
    story, _, is_told = _read(text)
    if not is_told:
        raise ValueError(f"text {text[:40]!r} must be a tale of the grammar; take one of `tell`")
    return story


def _read(text: str) -> tuple["Story", "_Parser", bool]:
    """What was read of a text, as far as it is a tale, and whether it is one to its end."""
    parser = _Parser(text)
    story = Story(parser)
    try:
        _tale(story)
        parser.finish()
    except _Refusal:
        return story, parser, False
    return story, parser, True


def entropy(num_tales: int = 2000, seed: int = 0, count: Callable[[str], int] | None = None) -> Entropy:
    """Estimates the entropy of the tales from `num_tales` (>= 2) fresh tales of the whole language.

    Args:
        num_tales: sample size.
        seed: which sample.
        count: units in a text, for instance `lambda text: len(tokenizer.encode(text)) + 1` for tokens with the
            end-of-sequence token; UTF-8 bytes when None.

    Returns:
        nats per tale, per byte and per unit (total nats over total units), each with its standard error.
    """
    if num_tales < 2:
        raise ValueError(f"num_tales={num_tales} must be at least 2 to estimate a standard error; try 2000")
    tales = [next(_tales(f"entropy/{seed}/{index}")) for index in range(num_tales)]
    nats = [-tale.logprob for tale in tales]
    sizes = [len(tale.text.encode()) for tale in tales]
    units = [count(tale.text) for tale in tales] if count else sizes
    return Entropy(num_tales, *ratio(nats, [1] * num_tales), *ratio(nats, sizes), *ratio(nats, units))


def ratio(totals: Sequence[float | int], units: Sequence[float | int]) -> tuple[float, float]:
    """Sum of `totals` over sum of `units`, and its standard error (linearised) when the pairs are independent."""
    number, unit_sum = len(totals), math.fsum(units)
    value = math.fsum(totals) / unit_sum
    squares = math.fsum((total - value * unit) ** 2 for total, unit in zip(totals, units, strict=True))
    return value, math.sqrt(squares * number / max(1, number - 1)) / unit_sum


# The stories ----------------------------------------------------------------------------------------------------------


def _tale(story: "Story") -> None:
    """Tells one tale: an opening, one of the plots, and, around the shorter plots, a setting and a close."""
    story.say("open")
    plot = story.say("fetch", "race", "setting")
    if plot != "setting":
        _PLOTS[plot](story)
        return
    _PLOTS[story.say("lost", "wish", "secret", "cry")](story)
    story.say("close")


def _fetch(story: "Story") -> None:
    """Somebody at home needs a thing from far away."""
    story.say("need")
    story.own(story["cure"], story["keeper"])
    _kindness(story)
    _obstacle(story)
    story.say("pay")
    story.hand(story["cure"], story["keeper"], story["hero"])
    story.say(story["relief"])


def _race(story: "Story") -> None:
    """The one who stops to help arrives first."""
    story.say("rival", rival=story.strangers)
    _kindness(story)
    story.say("past")
    _obstacle(story)
    story.say("win")


def _kindness(story: "Story") -> None:
    story.say("meet")
    story.say("kind")
    story.say("promise")


def _obstacle(story: "Story") -> None:
    """An obstacle that the animal met before, and no other, knows how to beat."""
    story.say(story["obstacle"])
    story.say("call")
    story.say(story["animal"])


def _lost(story: "Story") -> None:
    """A dear thing is lost in a way that suits it, asked after, and found where such things end up."""
    thing, hero, thief = story["thing"], story["hero"], story["thief"]
    story.own(thing, hero)
    story.say(thief)
    story.hand(thing, hero, thief)
    story.say("ask", one=words.WORDS["folk"], two=lambda: story.others(words.WORDS["folk"], "one"))
    story.say("hint", spot=words.LOSSES[thief][1])
    story.say(f"{thief} found")
    story.hand(thing, thief, hero)
    story.say("safe")


def _trade(story: "Story") -> None:
    """Three trades turn what the hero has into what somebody wishes for."""
    hero, goal = story["hero"], story["goal"]
    last = _MAKERS[goal]
    story.say("start", thing=[thing for thing in _MAKERS if _MAKERS[thing] != last])
    thing = story["thing"]
    story.own(thing, hero)
    makers = [maker for maker in words.GOODS if maker not in (last, _MAKERS[thing])]

    story.cast["reason"] = _REASONS[thing]
    story.say("trade one", one=makers, gift=lambda: tuple(words.GOODS[story["one"]]))
    gift = story["gift"]
    story.own(gift, story["one"])
    story.swap(thing, hero, gift, story["one"])

    story.cast["reason"] = _REASONS[gift]
    story.say("trade two", two=lambda: story.others(makers, "one"), swap=lambda: tuple(words.GOODS[story["two"]]))
    swap = story["swap"]
    story.own(swap, story["two"])
    story.swap(gift, hero, swap, story["two"])

    story.cast["reason"] = _REASONS[swap]
    story.cast["three"] = last
    story.say("trade three")
    story.own(goal, last)
    story.swap(swap, hero, goal, last)
    story.say("gift")
    story.hand(goal, hero, story["elder"])


def _secret(story: "Story") -> None:
    """A secret runs through three mouths to the one it is about, and is traced back the same way."""
    fact = story["fact"]
    story.learn(fact, story["friend"])
    story.learn(fact, story["hero"], story["friend"])
    story.say("vow")
    story.say("tell", second=story.strangers)
    story.learn(fact, story["second"], story["hero"])
    story.say("pass", third=words.WORDS["folk"])
    story.learn(fact, story["third"], story["second"])
    story.say("out")
    story.learn(fact, story["subject"], story["third"])
    story.say("trace")
    story.say("sorry")
    story.say(story["subject"])


def _rescue(story: "Story") -> None:
    """Bare hands do not help, a borrowed tool does, and it goes back to its owner."""
    trap, tool = story["trap"], story["tool"]
    story.say(f"{trap} try")
    story.say("borrow", owner=words.STUCK[trap][3])
    story.own(tool, story["owner"])
    story.hand(tool, story["owner"], story["hero"])
    story.say(trap)
    story.say("return")
    story.hand(tool, story["hero"], story["owner"])
    story.say("after")


_PLOTS = {"fetch": _fetch, "race": _race, "lost": _lost, "wish": _trade, "secret": _secret, "cry": _rescue}

_MAKERS = {thing: maker for maker, goods in words.GOODS.items() for thing in goods}
_REASONS = {thing: reason for goods in words.GOODS.values() for thing, reason in goods.items()}

# What else is settled once a role is cast: role -> filler -> further roles.
_LINKS: dict[str, dict[str, dict[str, str]]] = {
    "child": words.PRONOUNS,
    "hero": {name: words.PRONOUNS[child] for child, names in words.NAMES.items() for name in names},
    "animal": {
        animal: {"trouble": trouble, "kindness": kindness, "obstacle": obstacle}
        for animal, (trouble, kindness, obstacle) in words.ANIMALS.items()
    },
    "call": {call: {"called": called} for call, called in words.CALLS.items()},
    "ailment": {
        ailment: {"cure": cure, "keeper": keeper, "relief": relief}
        for ailment, (cure, keeper, relief) in words.NEEDS.items()
    },
    "price": {price: {"paid": paid} for price, paid in words.PRICES.items()},
    "thing": {thing: {"thief": thief} for thief, (things, _) in words.LOSSES.items() for thing in things},
    "subject": {subject: {"fact": fact} for subject, fact in words.SECRETS.items()},
    "victim": {
        victim: {"stuck": stuck, "trap": trap, "tool": tool}
        for trap, (stuck, victims, tool, _) in words.STUCK.items()
        for victim in victims
    },
}

_ALL_NAMES = tuple(name for names in words.NAMES.values() for name in names)
_LOSABLE = tuple(_LINKS["thing"])  # a thing is one of these unless a plot says otherwise

# Every filler that a role may have in some tale; what a role may be here and now is narrower.
_FILLERS: dict[str, tuple[str, ...]] = {
    **words.WORDS,
    **{role: tuple(links) for role, links in _LINKS.items()},
    **{
        role: tuple(dict.fromkeys(settled[role] for settled in links.values()))
        for links in _LINKS.values()
        for role in next(iter(links.values()))
    },
    "child": tuple(words.PRONOUNS),
    **dict.fromkeys(("rival", "friend", "second"), _ALL_NAMES),
    "thing": (*_LOSABLE, *_MAKERS),
    **dict.fromkeys(("goal", "gift", "swap"), tuple(_MAKERS)),
    **dict.fromkeys(("one", "two"), (*words.WORDS["folk"], *words.GOODS)),
    "third": words.WORDS["folk"],
    "three": tuple(words.GOODS),
    "reason": tuple(_REASONS.values()),
    "spot": tuple(spot for _, spots in words.LOSSES.values() for spot in spots),
    "owner": tuple(dict.fromkeys(owner for *_, owners in words.STUCK.values() for owner in owners)),
}


# The grammar ----------------------------------------------------------------------------------------------------------

# `no_type_check`: there are no arrays here, and to check types at run time, as tests do, makes tales 20 times slower.

Options = Sequence[str] | Callable[[], Sequence[str]]

_SLOT = re.compile(r"\{([aA] )?(~?)(\w+)\}")


@no_type_check
@dataclass(frozen=True)
class _Slot:
    article: str  # "", "a" or "A"
    fresh: bool
    role: str
    capital: bool

    def render(self, filler: str) -> str:
        if self.article:
            filler = f"{self.article}{'n' if filler[0] in 'aeiou' else ''} {filler}"
        return filler[0].upper() + filler[1:] if self.capital else filler


@functools.cache
def _parse(sentence: str) -> tuple[tuple[_Slot | None, str], ...]:
    """A sentence as (slot, literal text after it) pairs; the first has no slot."""
    split = _SLOT.split(sentence)
    parts: list[tuple[_Slot | None, str]] = [(None, split[0])]
    for article, fresh, role, literal in zip(split[1::4], split[2::4], split[3::4], split[4::4], strict=True):
        capital = role[0].isupper() or article == "A "
        parts.append((_Slot((article or "").strip(), bool(fresh), role.lower(), capital), literal))
    return tuple(parts)


@runtime_checkable
class Chooser(Protocol):
    """Picks one of several options and speaks it; `render` gives the words of an option."""

    logprob: float

    def choose(self, options: Sequence[T], render: Callable[[T], str]) -> T: ...

    def speak(self, text: str) -> None: ...


@no_type_check
class _Generator:
    """A chooser that takes an option at random and keeps what is said."""

    def __init__(self, random_number: Callable[[], float]):
        self.random_number, self.logprob, self.spoken = random_number, 0.0, list[str]()

    def choose(self, options: Sequence[T], render: Callable[[T], str]) -> T:
        chosen = options[int(self.random_number() * len(options))]
        self.logprob -= math.log(len(options))
        self.spoken.append(render(chosen))
        return chosen

    def speak(self, text: str) -> None:
        self.spoken.append(text)


class _Refusal(Exception):
    """The text does not go on as any tale does; the parser knows where."""


@no_type_check
class _Parser:
    """A chooser that takes the option with which a given text goes on."""

    def __init__(self, text: str):
        self.text, self.at, self.logprob, self.expected = text, 0, 0.0, list[str]()

    def choose(self, options: Sequence[T], render: Callable[[T], str]) -> T:
        for option in options:
            spoken = render(option)
            if self.text.startswith(spoken, self.at):
                self.at += len(spoken)
                self.logprob -= math.log(len(options))
                return option
        self.expected = [render(option) for option in options]
        raise _Refusal

    def speak(self, text: str) -> None:
        self.choose((text,), str)

    def finish(self) -> None:
        if self.at < len(self.text):
            self.expected = []
            raise _Refusal


@no_type_check
class Story:
    """A tale in progress: its cast, who owns and knows what, and the chooser that tells or reads it.

    Other scenes than the embedded ones can be given; `fillers` are then the options of roles without narrower ones.
    """

    def __init__(
        self,
        chooser: Chooser,
        scenes: Mapping[str, Sequence[str]] = words.SCENES,
        fillers: Mapping[str, Sequence[str]] = _FILLERS,
    ):
        self.chooser, self.scenes, self.fillers = chooser, scenes, fillers
        self.cast: dict[str, str] = {}
        self.owners: dict[str, str] = {}
        self.first_owners: dict[str, str] = {}
        self.knowers: dict[str, list[str]] = {}
        self.tellers: dict[str, str] = {}  # who heard a secret → who told it
        self.sentence = ""  # the template being said, and the scenes it was chosen from
        self.offered: tuple[str, ...] = ()
        self.separator = ""

    def __getitem__(self, role: str) -> str:
        return self.cast[role]

    def say(self, *scenes: str, **options: Options) -> str:
        """Says one sentence of the scenes, all equally likely, and returns the scene it is from.

        Keyword arguments narrow the fillers of roles not yet cast: a sequence, or a function called when it is needed.
        """
        self.offered, self.sentence = scenes, ""
        offers = [(scene, sentence) for scene in scenes for sentence in self.scenes[scene]]
        scene, self.sentence = self.chooser.choose(
            offers, lambda offer: self.separator + self._forced(_parse(offer[1]), 0)[0]
        )
        parts = _parse(self.sentence)
        used: set[str] = set()  # a sentence does not say the same fresh word twice
        _, index = self._forced(parts, 0)
        while index < len(parts):
            self._fill(parts[index], options, used)
            forced, index = self._forced(parts, index + 1)
            if forced:
                self.chooser.speak(forced)
        self.separator = " "
        return scene

    def _forced(self, parts: Sequence[tuple[_Slot | None, str]], index: int) -> tuple[str, int]:
        """The text from part `index` on that leaves no choice, and the index of the next part with a choice."""
        text = []
        while index < len(parts):
            slot, literal = parts[index]
            if slot is not None:
                if slot.fresh or slot.role not in self.cast:
                    break
                text.append(slot.render(self.cast[slot.role]))
            text.append(literal)
            index += 1
        return "".join(text), index

    def _fill(self, part: tuple[_Slot | None, str], narrowed: Mapping[str, Options], used: set[str]) -> None:
        """Chooses a filler for an open slot, speaks it with the literal that follows, and casts it."""
        slot, literal = part
        assert slot is not None
        options = narrowed.get(slot.role) or self._allowed(slot.role)
        if callable(options):
            options = options()
        if used and slot.fresh:
            options = [option for option in options if option not in used]
        filler = self.chooser.choose(options, lambda option: slot.render(option) + literal)
        if slot.fresh:
            used.add(filler)
        else:
            self.cast[slot.role] = filler
            self.cast.update(_LINKS.get(slot.role, {}).get(filler, {}))

    def _allowed(self, role: str) -> Sequence[str]:
        if role == "hero" and "child" in self.cast:
            return words.NAMES[self["child"]]
        if role == "friend":
            return self.strangers()
        if role == "thing":
            return _LOSABLE
        return self.fillers[role]

    def strangers(self) -> Sequence[str]:
        """Names that nobody in this tale has yet."""
        taken = {self.cast.get(role) for role in ("hero", "friend")}
        return [name for name in _ALL_NAMES if name not in taken]

    def others(self, fillers: Iterable[str], *roles: str) -> Sequence[str]:
        """The fillers that these roles do not have."""
        taken = {self.cast.get(role) for role in roles}
        return [filler for filler in fillers if filler not in taken]

    # The world: things have one owner, and secrets come from somebody who knows them.

    def own(self, thing: str, owner: str) -> None:
        self.owners[thing] = owner
        self.first_owners.setdefault(thing, owner)

    def hand(self, thing: str, giver: str, taker: str) -> None:
        assert self.owners[thing] == giver, f"{giver} gives away the {thing} of {self.owners[thing]}"
        self.owners[thing] = taker

    def swap(self, thing: str, owner: str, other_thing: str, other_owner: str) -> None:
        self.hand(thing, owner, other_owner)
        self.hand(other_thing, other_owner, owner)

    def learn(self, fact: str, who: str, told_by: str = "") -> None:
        knowers = self.knowers.setdefault(fact, [])
        assert not told_by or told_by in knowers, f"{told_by} tells {who} what {told_by} does not know"
        knowers.append(who)
        if told_by:
            self.tellers[who] = told_by


def _tales(stream: str) -> Iterator[Tale]:
    """Endless independent tales; the same for the same stream name."""
    digest = hashlib.blake2b(stream.encode(), digest_size=16, person=b"tale stream").digest()
    random_number = random.Random(int.from_bytes(digest, "big")).random  # the one generator Python promises to keep
    while True:
        generator = _Generator(random_number)
        _tale(Story(generator))
        yield Tale("".join(generator.spoken), generator.logprob)


# Why a text was refused -----------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r'(?<=[.!?])["]?\s+(?=["A-Z]|\{[A-Z])')
MAX_SENTENCE_CHARS = 400  # characters; no sentence of the tales comes near
_PRONOUN_ROLES = ("he", "him", "his", "child")


@dataclass(frozen=True)
class _Form:
    """A single sentence of some scene, to be matched with any fillers of the right kinds."""

    scene: str
    sentence: str
    slots: tuple[_Slot, ...]
    pattern: re.Pattern[str]


@functools.cache
def _forms() -> tuple[_Form, ...]:
    """Every sentence of every scene, loosely: a slot takes any filler that its role may have in some tale."""
    forms = []
    for scene, sentences in words.SCENES.items():
        for sentence in sentences:
            for _, _, single in _split_sentences(sentence):
                parts = _parse(single)
                slots = tuple(slot for slot, _ in parts if slot)
                pattern = "".join((_any_filler(slot) if slot else "") + re.escape(literal) for slot, literal in parts)
                forms.append(_Form(scene, sentence, slots, re.compile(pattern)))
    return tuple(forms)


@functools.cache
def _any_filler(slot: _Slot) -> str:
    return f"({'|'.join(re.escape(slot.render(filler)) for filler in _FILLERS[slot.role])})"


def _split_sentences(text: str) -> list[tuple[int, int, str]]:
    """Start, end and text of each sentence, without the space between; quotes stay with their sentence."""
    sentences, start = [], 0
    for gap in _SENTENCE_END.finditer(text):
        end = gap.start() + (1 if text[gap.start()] == '"' else 0)
        sentences.append((start, end, text[start:end]))
        start = gap.end()
    sentences.append((start, len(text), text[start:]))
    return sentences


def _explain(text: str, story: Story, parser: _Parser) -> tuple[str, str]:
    """Kind and reason of a refusal: the first sentence at fault, matched with free fillers against all we could say."""
    if not text.strip():
        return "grammar", "the text is empty"
    rest = text[parser.at : parser.at + MAX_SENTENCE_CHARS]
    if not parser.expected:
        return "grammar", f"the tale is over, but the text goes on with {_quote(rest)}"
    shared = max(_common_prefix(rest, option) for option in parser.expected)
    far = parser.at + shared
    sentences = _split_sentences(text[: far + MAX_SENTENCE_CHARS])
    number, sentence = next(
        (number, sentence)
        for number, (_, end, sentence) in enumerate(sentences, 1)
        if far < end or number == len(sentences)
    )
    if not rest:
        return "grammar", f"the tale stops after sentence {number}, {_quote(sentence)}"
    if far >= len(text):
        return "grammar", f"the tale stops in sentence {number}, after {_quote(text[-40:])}"
    word = rest.rfind(" ", 0, shared + 1) + 1  # where the first word that differs begins
    near = [option[word:].strip() for option in parser.expected if option.startswith(rest[:shared])]
    instead = f"expected {_some(near)} but found {_quote(rest[word:].strip())}"
    matches = [(form, found.groups()) for form in _forms() if (found := form.pattern.fullmatch(sentence))]
    if not matches:
        return "grammar", f"sentence {number}: {instead}"
    for form, found in matches:
        if form.sentence == story.sentence or (not story.sentence and form.scene in story.offered):
            for slot, filler in zip(form.slots, found, strict=True):
                due = story.cast.get(slot.role)
                if not slot.fresh and due is not None and filler != slot.render(due):
                    return "world", f"sentence {number}: {_quote(sentence)} {_contradiction(story, slot, filler, due)}"
    return "world", f"sentence {number}: {_quote(sentence)} cannot come here: {instead}"


def _contradiction(story: Story, slot: _Slot, filler: str, due: str) -> str:
    if slot.role in _PRONOUN_ROLES:
        return f'says "{filler}", but {story["hero"]} is a {story["child"]}'
    bare = re.sub(r"^[Aa]n? ", "", filler)
    reason = f'says "{bare}", but the {slot.role} of this tale is "{due}"'
    for thing in (due, bare):
        if thing in story.owners:
            owner = story.owners[thing]
            reason += f"; {owner if owner[0].isupper() else f'the {owner}'} has the {thing}"
    return reason


def _some(options: Sequence[str]) -> str:
    return " or ".join(map(_quote, options[:3])) + (f" or {len(options) - 3} more" if len(options) > 3 else "")


def _quote(text: str, max_chars: int = 50) -> str:
    return f'"{text}"' if len(text) <= max_chars else f'"{text[: max_chars - 3]}..."'


def _common_prefix(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints tales and their nats."""
    parser = argparse.ArgumentParser(description="Tells tales from the embedded story grammar.")
    parser.add_argument("--count", type=int, default=3, help="number of tales")
    parser.add_argument("--start", type=int, default=0, help="index of the first tale")
    parser.add_argument("--split", choices=SPLIT_SHARES, default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for index in range(args.start, args.start + args.count):
        tale = tell(index, args.split, args.seed)
        print(f"{tale.text}\n    [{len(tale.text.split())} words, {-tale.logprob:.1f} nats]\n")


if __name__ == "__main__":
    main()
