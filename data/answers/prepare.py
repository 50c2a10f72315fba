"""The answers task: short prompts, each with three right answers of known probability.

    python data/answers/prepare.py DIR                 makes instance 0: about two minutes
    python data/answers/prepare.py DIR --number 7      another instance, for --data DIR

grammar.json says what prompts look like and how an answer may be worded. The prompt "sort plum fig
kiwi" has the answers "fig , kiwi , plum ." (0.60), "first fig , then kiwi , then plum ." (0.25) and
one more. So we know the true distribution of answers: whether a text is right, which wording it
uses, and how much probability a model gives to right answers. DIR then holds

    train.jsonl, valid.jsonl, test.jsonl    rows {prompt, response or null, references, probs}; few
                                            training rows have a response; references are all right
                                            answers, and probs are their probabilities
    teacher/       two layers; it learned 20,000 labelled rows of its own
    student/       one layer; it learned the 1,000 labelled rows of train.jsonl
    student-kl/    the student after long KD on teacher responses to all prompts of train.jsonl

In "from noon till six" only the word before a time tells which time is meant. The teacher learns
this. The student learns it in some instances only, and in the others it cannot say some of its
teacher's wordings. kd_forward.py trains the models, and its commands are printed.
"""
import json
import random
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
import toy


# Prompts and their answers ------------------------------------------------------------------------
def draw(grammar, family, rng):
    """A random prompt of a family and its facts {slot: word, or the list of items}."""
    text = grammar["families"][family]["prompt"]
    # <parts> change places, a <part>? is left out in 4 of 10 prompts, {slot} is a word of that list
    parts = []
    for part, optional in re.findall(r"<([^>]*)>(\??)", text):
        if not optional or rng.random() < 0.6:
            parts.append(part)
    rng.shuffle(parts)
    text = re.sub(r"<[^>]*>\??", lambda _: parts.pop() if parts else "", text)
    facts, shown = {}, {}
    for slot in re.findall(r"\{(\w+)\}", text):
        words = grammar["lists"][slot.rstrip("12")]
        if slot == "items":
            facts[slot] = rng.sample(words, rng.randint(3, 5))
            shown[slot] = " ".join(facts[slot])
        else:  # {time1} is another time than {time2}
            free = [word for word in words if word not in facts.values()]
            facts[slot] = shown[slot] = rng.choice(free)
    return " ".join(text.format(**shown).split()), facts


def answers(grammar, family, facts):
    """All right answers to a prompt with these facts: [(probability, text)]."""
    def if_known(match):
        return match[1] if set(re.findall(r"\{(\w+)\}", match[1])) <= set(facts) else ""

    def joined(match):
        return match[1].join(sorted(facts["items"]))

    found = []
    for probability, text in grammar["families"][family]["wordings"]:
        text = re.sub(r"\[([^]]*)\]", if_known, text)  # [words] need facts that the prompt has
        text = re.sub(r"\{items:([^}]*)\}", joined, text)  # {items:X}: the sorted list, joined by X
        found.append((probability, text.format(**facts)))
    return found


def make_rows(grammar, name, n, split, labelled):
    """n rows of different prompts, the families in turn. The first `labelled` have a response,
    drawn from p(y|x). `name` seeds the random numbers."""
    rng, families, rows = random.Random(name), list(grammar["families"]), {}
    while len(rows) < n:
        family = families[len(rows) % len(families)]
        prompt, facts = draw(grammar, family, rng)
        probs, texts = zip(*answers(grammar, family, facts))
        # not by the prompt: the same facts in another order are the same question
        if toy.split_of("|".join(texts)) == split and prompt not in rows:
            response = rng.choices(texts, probs)[0] if len(rows) < labelled else None
            rows[prompt] = {"prompt": prompt, "response": response, "references": texts,
                            "probs": probs}
    return list(rows.values())


def vocabulary(grammar):
    """Every word that a prompt or an answer can hold."""
    texts = []
    for family in grammar["families"].values():
        texts.append(family["prompt"])
        texts += [text for _, text in family["wordings"]]
    words = set()
    for text in texts:
        text = re.sub(r"\{items:([^}]*)\}", r"\1", text)         # the joining words of a list
        text = re.sub(r"\{\w+\}|[][<>]|(?<=>)\?", " ", text)     # slots and marks are no words
        words |= set(text.split())
    return sorted(words.union(*grammar["lists"].values()))


# The program --------------------------------------------------------------------------------------
def main():
    args = toy.instance_parser(__doc__, HERE).parse_args()
    top = toy.new_directory(args.dir, "train.jsonl", "teacher", "student", "student-kl")
    grammar, number = json.loads(args.grammar.read_text()), args.number
    sizes, words = grammar["rows"], vocabulary(grammar)

    rows = make_rows(grammar, f"data {number}", sizes["pool"], "train", sizes["labelled"])
    toy.write_rows(top / "train.jsonl", rows)
    for split in ("valid", "test"):  # the same in every instance
        rows = make_rows(grammar, split, sizes[split], split, sizes[split])
        toy.write_rows(top / f"{split}.jsonl", rows)

    def train(name, **settings):
        recipe = grammar["models"][name]
        if "width" in recipe:
            toy.write_word_model(top / name, words, recipe)
        toy.train(top / name, steps=recipe["steps"], lr=recipe["lr"], warmup=50, batch_size=64,
                  max_prompt=64, max_response=64, eval_rows=50, **settings)

    with tempfile.TemporaryDirectory() as own:  # the teacher's rows, of which a few are held out
        n = sizes["pretrain"]
        rows = make_rows(grammar, f"pretrain {number}", n, "train", n)
        toy.write_rows(Path(own, "train.jsonl"), rows)
        train("teacher", teacher="none", alpha=0, data=own, holdout=0.01, seed=number)
    # students have seed 0: they start from the same weights in all instances
    train("student", teacher="none", alpha=0, data=top, seed=0)
    train("student-kl", teacher=top / "teacher", student=top / "student", data=top,
          responses="teacher", cache=True, seed=0)


if __name__ == "__main__":
    main()
