"""Grade replies: parse the answer from a reply, and decide by fixed rules whether it is correct.

The stated confidence is removed from the reply first. A reply that the rules do not decide has no answer (None) and is
wrong: a grader that guesses would hide the hedging that a calibrated model should express as a number.

Yes/no replies, in this order:

1. Idioms that only look like a "no" are removed ("no doubt", "not only").
2. A yes or no word at the start decides, after lead-ins such as "The answer is" or "I think": "Yes, there is no dog" is
   yes. If the opposite word also stands alone ("Yes and no", "Yes. No.", "No, yes"), there is no answer.
3. Uncertainty is no answer: "I don't know", "It cannot be determined", "Maybe".
4. A yes or no that stands alone in a later clause decides ("A dog? Yes.").
5. Otherwise the clauses about what the question asks decide, by whole words: "There is a cat, but no dog" is no to "Is
   there a dog?" and yes to "Is there a cat?". Such a clause affirms ("There is", "I see", "The image shows", "... is
   visible") or denies ("no", "zero", "not", "n't", "without", "unlikely", "instead of", "lacks"). A clause that names
   nothing is about the question as well ("I don't see one"), unless the clause before it is about something else.
6. There is no answer if such clauses disagree, if one denies twice, or if there is none: "There is a cat" leaves open
   whether there is a dog, "It is white" may mean either, and "There may be a dog" means neither.

Short and open answers are matched strictly unless `Grading` selects another rule. The reply, or its first sentence
without a lead-in ("It is", "The object at the top left is") and without a closing phrase of place ("in the image", "at
the top left"), must equal the gold answer or a synonym after VQA normalisation, which ignores case, punctuation,
articles, number words and plurals. An extra word makes an answer wrong: "brown dog" is not "dog" ("hot dog" is not
either), and "a dog or a cat" matches neither.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

from vlm_calibration.records import ANSWER_TYPES, AnswerType
from vlm_calibration.text.confidence import strip_confidence
from vlm_calibration.text.matching import first_answer, fold, match_key, normalise, token_f1


class Grade(NamedTuple):
    """The parsed answer of a reply, None if it has none, and whether it is correct."""

    predicted: str | None
    correct: bool


Verdict = Literal["yes", "no"]
TextGrader = Literal["exact", "contains", "token_f1"]


@dataclass(frozen=True)
class Grading:
    """The rules by which short and open answers are graded; yes/no answers have a single rule.

    "exact": the strict match of this module. "contains": the reply contains the gold answer or a synonym as whole words
    after the same normalisation ("It is not a dog" contains "dog"). "token_f1": the F1 of words shared with the gold answer
    or a synonym, as in SQuAD (Rajpurkar et al., arXiv 1606.05250), is at least `min_f1`.

    Args:
        short: rule for short answers.
        open: rule for open answers.
        min_f1: minimum F1 of a correct answer under "token_f1", in (0, 1].
        rank_levels: `levels fit`, and nothing else, ranks given open answers: how often the model assigns the gold answer a higher
            log-likelihood per token than every wrong answer of the source, whatever it would generate.

    Raises:
        ValueError: an unknown rule, or `min_f1` is not in (0, 1].
    """

    short: TextGrader = "exact"
    open: TextGrader = "exact"
    min_f1: float = 0.5
    rank_levels: bool = False

    def __post_init__(self) -> None:
        for name, rule in (("short", self.short), ("open", self.open)):
            if rule not in (known := get_args(TextGrader)):
                raise ValueError(f"grading.{name} must be one of {', '.join(known)}, found {rule!r}")
        if not 0 < self.min_f1 <= 1:
            raise ValueError(f"grading.min_f1 must be in (0, 1], found {self.min_f1}")

    def rule(self, answer_type: str) -> str:
        """The rule for an answer type: "exact", "contains", "token_f1 >= 0.5"."""
        name = {"short": self.short, "open": self.open}.get(answer_type, "exact")
        return f"{name} >= {self.min_f1:g}" if name == "token_f1" else name

    def level_rule(self, answer_type: str) -> str:
        """By what `levels fit` measures an answer type, as written in a level table: its rule, or "ranking"."""
        return "ranking" if self.rank_levels and answer_type == "open" else self.rule(answer_type)


EXACT = Grading()


def parse_answer(text: str, answer_type: AnswerType, question: str = "") -> str | None:
    """Parse the answer from a reply, with or without a stated confidence, by the rules above.

    Returns "yes" or "no"; for other answer types the answer after VQA normalisation, without lead-in; None if there is none.

    Args:
        answer_type: "yes_no", "short" or "open"; ValueError for another.
        question: what a yes/no reply answers; without it, every clause of a reply counts (rule 5).
    """
    if answer_type not in ANSWER_TYPES:
        raise ValueError(f"unknown answer type {answer_type!r}; known: {', '.join(ANSWER_TYPES)}")
    answer = strip_confidence(text)
    if answer_type == "yes_no":
        return _yes_or_no(answer, question)
    return normalise(first_answer(answer)) or normalise(answer) or None


def grade(
    text: str,
    answer: str,
    answer_type: AnswerType,
    synonyms: Sequence[str] = (),
    grading: Grading = EXACT,
    question: str = "",
) -> Grade:
    """Grade a reply against the gold answer; `text`, `answer_type` and `question` as in `parse_answer`.

    A ValueError for an unknown answer type, an empty gold answer, or a gold answer to a yes/no question that is neither.

    Args:
        answer: the gold answer; for yes/no, a text that itself parses as yes or no.
        synonyms: other correct answers (not used for yes/no).
    """
    predicted = parse_answer(text, answer_type, question)
    if answer_type == "yes_no":
        gold = _yes_or_no(answer)
        if gold is None:
            raise ValueError(f"the gold answer of a yes/no question must be yes or no, got {answer!r}")
        return Grade(predicted, predicted == gold)
    if not match_key(answer):
        raise ValueError(f"the gold answer of a {answer_type} question is empty: {answer!r}")
    reply, rule = strip_confidence(text), grading.short if answer_type == "short" else grading.open
    if rule == "token_f1":
        f1 = max(token_f1(reply, gold_answer) for gold_answer in (answer, *synonyms))
        return Grade(predicted, f1 >= grading.min_f1)
    reply, accepted = match_key(reply), set(map(match_key, (answer, *synonyms))) - {""}
    if rule == "contains":
        return Grade(predicted, any(f" {key} " in f" {reply} " for key in accepted))
    # The full reply may match as well: some answers look like a lead-in or several sentences ("Dr. No").
    return Grade(predicted, reply in accepted or (predicted is not None and match_key(predicted) in accepted))


_IDIOMS = re.compile(
    r"\b(?:there(?: is|'s) )?no (?:doubt|question)\b(?: about (?:it|that)\b)?(?: that\b)?"
    r"|\bwithout (?:a |any )?(?:doubt|question)\b|\bnot only\b|\bno problem\b| at all\b"
)
_YES_NO_LEAD_IN = re.compile(
    r"(?:(?:the |my |final |short |correct ){0,3}answer(?: to (?:the|this|your) question)?(?: is| would be)?\b"
    r"|i (?:think|believe|guess|would say)\b(?! so\b)|i'd say\b(?! so\b)|i(?: am|'m) (?:sure|certain|confident|afraid)\b"
    r"|(?:based on|in|from|looking at|according to) (?:the|this) (?:image|picture|photo)\b"
    r"|it (?:(?:would |does )?(?:seem|appear)|seems|appears)\b(?! (?:so|to)\b)"
    r"|(?:it )?looks (?:like|as if|as though)(?= (?:there|the (?:image|picture|photo|scene)|i|you|we|no|yes|not)\b)"
    r"|(?:well|hmm|okay|ok|so(?! it (?:seems|appears|looks)\b)|that|like|as if|probably|likely|most likely|clearly|apparently|actually|unfortunately|sadly)\b"
    r"|(?:absolutely|definitely|certainly|of course|sure)(?=,? \w)"
    # In front of other words it is the answer itself: "Indeed it is".
    r"|indeed(?=,? (?:there|no|not|none|never|nothing|yes|i)\b)) ?[:,]? ?"
)
_YES = re.compile(
    r"(?:yes|yeah|yep|yup|affirmative|true|correct|indeed|absolutely|definitely|certainly|of course|sure)(?!\w)"
)
# In front of a noun, "no" is a determiner: "No cat, but a dog".
_NO = re.compile(
    r"(?:nope|nah|negative|false|incorrect)(?!\w)"
    r"|no(?= ?(?:\Z|[^\w\s]|(?:and|or|but|because|since|as|there|it|i|you|we|he|she|they|the|this|that|in|on|not|no)\b))"
)
# A yes or no at the start of a clause, followed by no word other than "and" or "or".
_LONE = re.compile(
    r"(?:\A|[,;:/.!?—–-]|\b(?:and|or|but|also)\b) ?(yes|yeah|yep|no|nope|nah)(?= ?(?:\Z|[,;:/.!?—–-]|(?:and|or)\b))"
)
_CANNOT_TELL = re.compile(
    r"\b(?:maybe|perhaps|possibly|unclear|unsure|unknown|unable|uncertain|it depends|no idea|hardly|barely|scarcely"
    r"|except|besides|other than|(?:apart|aside) from|(?:none|nothing|nobody|no one) but"
    r"|(?:not|hard|difficult|impossible)(?: possible| easy)? (?:sure|certain|clear|to (?:tell|say|see|know|determine))"
    r"|(?:don't|do not|can't|cannot|can not|couldn't|could not)(?: really)? "
    r"(?:know|tell|say|determine|answer|be (?:sure|certain|determined|seen clearly)|judge|confirm|see clearly))\b"
)
_PICTURE = r"(?:the|this) (?:image|picture|photo|photograph|scene)"
_NEGATION = re.compile(
    r"\b(?:no|not|none|never|neither|nor|nothing|nowhere|cannot|zero|0(?![.\d])|without|unlikely|lack(?:s|ing)?|devoid|absence"
    r"|fail(?:s|ed)? to|(?:free|instead|in place) of|rather than)\b|n't\b"
    rf"|\b(?:absent|missing)\b(?= (?:from|in) {_PICTURE}|\Z)"
)
_SURELY = (
    r"(?: (?:also|clearly|indeed|certainly|definitely|probably|likely|really|actually|just|do|does|can))?"
)
_BE = r"(?: is| are|'s|(?: (?:would|do|does))? (?:appears?|seems?|looks?) to be)"
_AFFIRMATION = re.compile(
    rf"there{_SURELY}{_BE}\b|(?:i|you|we|one){_SURELY}{_SURELY} (?:see|spot)s?\b"
    rf"|{_PICTURE}{_SURELY} (?:shows?|contains?|includes?|depicts?|features?|has|have"
    r"|(?:appears?|seems?) to (?:show|contain|include|depict|feature|have))\b"
    r"|(?:(?:it|that)(?: (?:would|does))? (?:seems?|appears?|looks?)|(?:so it )?(?:seems|appears)"
    r"|i (?:do )?(?:think|believe|guess|suppose|would say)|i'd say) so\b|so it (?:seems|appears|looks)\b"
    r"|(?:it )?(?:does )?looks? like it\Z"
    rf"|.*\b(?:is|are){_SURELY} (?:visible|present|seen)\b|.*\b(?:can|could){_SURELY} be{_SURELY} seen\b"
)
# A relative clause is a clause of its own: "a dog that is not brown".
_CLAUSE_END = re.compile(
    r"(?<=\?)|[,;:.!](?!\d)|[—–]| - |\b(?:but|and|yet|while|whereas|however|though|although|because|since)\b|\b(?=nor\b)"
    r"|\b(?:that|which|who)(?= (?:is|are|do|does|has|have|can|looks?|appears?)(?:n't)?\b)"
)
# "a dog" in "There is a cat, a dog and a bird".
_LISTED = re.compile(
    r"(?:also )?(?:an?|another|some|several|many|one|two|three|four|\d+)\b"
    r"(?!.*\b(?:is|are|was|were|would|could|may|might|must|should)\b)|\w+\Z"
)
_IN_PICTURE = re.compile(
    r"\b(?:in|on|within|at|from|of) (?:(?:the|this|that) )?(?:image|picture|photo|photograph|scene|view|frame|it)\b"
)
_COMPOUND = re.compile(r"\b(hot(?= dog)|teddy|toy|stuffed) ")


def _stems(words: str) -> frozenset[str]:
    return frozenset(match_key(word) for word in words.split())


_FUNCTION = _stems(
    "is are was were be been being am do does did has have had can ca could will wo would shall should may might must there here "
    "it its this that these those they them he she i id im you we us me my your our their his her any some such and or of to for "
    "by with as than if so like far see spot find found notice observe detect identify look seem appear think believe suppose show "
    "contain include depict feature display exist image picture photo photograph scene view frame visible present shown seen depicted "
    "pictured sign evidence trace sure true case also really actually clearly visibly currently even either ever likely probably "
    "certainly definitely indeed what which who where how"
)
"""Words that say nothing about what a question or a reply names."""
_PLACES = _stems(
    "one ones single anything anywhere in on at near from within left right top bottom middle center background foreground side corner "
    "part front behind under above below beside next inside outside nearby together over around between against up down"
)
"""Words that say nothing about what a reply names if the question has none of them."""


def _yes_or_no(answer: str, question: str = "") -> Verdict | None:
    """Rules 1 to 6 of the module in order."""
    text = _without_lead_ins(_plain(answer))
    yes, no = _YES.match(text), _NO.match(text)
    cannot_tell = _CANNOT_TELL.search(text)
    leading = yes or no
    if cannot_tell and (not leading or cannot_tell.start() == 0):
        return None  # "no idea" starts with a negation but is uncertainty
    lone = _LONE.findall(text[leading.end() :] if leading else text)
    verdicts: set[Verdict | None] = {"yes" if word.startswith("y") else "no" for word in lone}
    if leading:
        verdicts.add("yes" if yes else "no")
    verdicts = verdicts or _verdicts(text, _plain(question))
    return verdicts.pop() if len(verdicts) == 1 else None


def _plain(text: str) -> str:
    text = re.sub(r"[\s*_`\"#>“”]+", " ", fold(text))
    return re.sub(r"\b(?:nobody|no one)\b", "no person", _IDIOMS.sub("", text)).strip(" ,;:.!—–-")


def _without_lead_ins(text: str) -> str:
    for _ in range(4):
        lead_in = _YES_NO_LEAD_IN.match(text)
        text = text[lead_in.end() :] if lead_in else text
    return text


def _verdicts(text: str, question: str) -> set[Verdict | None]:
    """What each clause about the question says; None for one that denies twice. Empty for a negative question."""
    if _NEGATION.search(question):
        return set()
    verdicts: set[Verdict | None] = set()
    asked = [word for word in _words(_IN_PICTURE.sub("", question)) if word not in _FUNCTION]
    # Words that add nothing to what is asked.
    same = _FUNCTION.union(asked, _PLACES if _PLACES.isdisjoint(asked) else ())
    affirming, on_topic = False, True
    for clause in map(_without_lead_ins, map(str.strip, _CLAUSE_END.split(text))):
        if not clause or clause.endswith("?"):
            continue
        denial = _NEGATION.search(clause)
        before, denied = (clause[: denial.start()], clause[denial.end() :]) if denial else (clause, "")
        subject, named = _words(before), set(_words(clause)) - (same - set(asked))
        affirms = bool(_AFFIRMATION.match(before))
        if denial:
            # "There is a chair without a dog" affirms and denies, "There is no dog" denies.
            affirms = affirms and bool(named.intersection(subject))
        else:
            affirms = affirms or (affirming and bool(_LISTED.match(clause)))
        affirming = affirms and not denial
        if not named and not on_topic:
            continue  # "it" is something else
        on_topic = not asked or not named or not named.isdisjoint(asked)
        if affirms and "or" not in before.split() and (not named or _names(subject, asked)):
            verdicts.add("yes")
        if denial:
            subject = [] if affirms else subject
            parts = (_words(part) for part in re.split(r"\bor\b", denied))
            if any(_denies(subject, part, asked, same) for part in parts):
                verdicts.add(None if _NEGATION.search(denied) else "no")
    return verdicts


def _words(text: str) -> list[str]:
    return match_key(_COMPOUND.sub(r"\1", text)).split()


def _denies(subject: list[str], denied: list[str], asked: Sequence[str], same: frozenset[str]) -> bool:
    """Whether a clause with these words in front of its negation and behind it denies what is asked, or a part of it."""
    words = [*subject, *denied]
    if same.issuperset(words):
        return _in_order([word for word in words if word in asked], asked)  # "It is not red"
    if not asked:
        return True
    if asked[-1] not in denied or not _names(words, asked):
        return False
    return same.issuperset(denied[: denied.index(asked[-1])])  # "There is no brown dog" leaves others.


def _names(words: Sequence[str], asked: Sequence[str]) -> bool:
    """Whether the words name what is asked, in its order, and not as a part of another noun: "dog bowl"."""
    return _in_order(asked, words) and all(
        any(following in known for known in (_FUNCTION, _PLACES, asked)) or following.endswith(("ing", "ed"))
        for word, following in pairwise(words)
        if word in asked
    )


def _in_order(words: Sequence[str], text: Sequence[str]) -> bool:
    """Whether the words occur in the text in this order."""
    rest = iter(text)
    return all(word in rest for word in words)
