"""Text for `benchmarks.minilm`: prose of this repository to calibrate with, and made-up sentences to be judged by."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
# For each topic who does what to what. Sentences of a topic are alike, and of two topics are not.
TOPICS = """
The cook, My aunt, A tired baker; tastes, stirs; the lentil soup, a bowl of dough
The ferry, A fishing boat, Our captain; leaves, circles; the harbour, a rocky island
The gardener, Our neighbour, A child; waters, digs up; the roses, some carrots
The violinist, A street band, Her brother; plays, rehearses; a slow waltz, the finale
The goalkeeper, A young striker, The coach; watches, curses; the penalty, the referee
The nurse, A surgeon, The night doctor; examines, comforts; the patient, a small boy
The storm, A cold wind, Heavy snow; closes, reaches; the mountain pass, the valley
The judge, A young lawyer, The jury; questions, believes; the witness, the accused man
The probe, A small telescope, The crew; observes, approaches; the comet, Saturn's rings
The conductor, A late traveller, The guard; misses, stops; the express train, the tram
The teller, An old investor, The auditor; counts, mistrusts; the savings, the loan papers
The fox, A barn owl, The ranger; follows, startles; a lame deer, the field mice
The teacher, A shy pupil, The caretaker; cleans, leaves; the blackboard, the gym hall
The engineer, A new intern, The server; restarts, loses; the database, a backup job
The painter, A forger, The museum; restores, sells; the old portrait, a landscape
The beekeeper, A swarm, The queen bee; leaves, inspects; the wooden hive, the lime tree
The guide, A lost hiker, My cousin; describes, photographs; the desert road, a ruined fort
The cobbler, A dancer, The shop girl; repairs, polishes; the leather boots, red sandals
The grower, A wine dealer, The waiter; opens, praises; a dusty bottle, the new vintage
The reporter, An angry reader, The editor; corrects, doubts; the headline, the long column
"""


def judged() -> list[str]:
    """240 sentences, 12 of each topic, of one and two clauses."""
    found = []
    for topic in TOPICS.strip().splitlines():
        who, does, what = (part.split(", ") for part in topic.split("; "))
        for place, words in enumerate(product(who, does, what)):
            sentence = " ".join(words)
            more = f", and {who[(place + 1) % 3].lower()} {does[place % 2]} {what[(place + 1) % 2]} until evening"
            found.append(f"{sentence}{more if place % 3 == 0 else ''}.")
    return found


def shipped() -> list[str]:
    """Sentences of the docs, without tables, code and links."""
    found = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", "#", "    ")))
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "")
        sentences = re.split(r"(?<=[.:;!?])\s+", " ".join(text.split()))
        found += [sentence for sentence in sentences if len(sentence.split()) > 4 and "|" not in sentence]
    return found
