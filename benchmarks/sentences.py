"""Made-up sentences for `benchmarks.minilm`: some to calibrate with, and others, of other topics, to be judged by."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

# For each topic who does what to what. Sentences of a topic are alike, and of two topics are not.
JUDGED = """
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

CALIBRATION = """
the plumber, a careful tenant, the landlord; repairs, notices; the leaking tap, an old boiler
the chemist, a keen student, the laboratory; dissolves, weighs; the white powder, a copper salt
the pilot, a steward, the control tower; checks, repeats; the altitude, the landing lights
the farmer, a hired hand, the vet; feeds, counts; the brown cows, a dozen hens
the poet, a translator, the publisher; rewrites, recites; the second verse, a long ballad
the mayor, a voter, the council; opposes, funds; the new bridge, a public library
the diver, a marine biologist, the research vessel; explores, maps; the coral reef, a deep trench
the tailor, a bridegroom, the apprentice; shortens, irons; the grey trousers, a silk tie
the astronomer, a schoolboy, the old professor; calculates, draws; the orbit, a lunar eclipse
the dentist, an anxious patient, the receptionist; postpones, expects; the appointment, a small filling
the carpenter, a furniture maker, my grandfather; sands, varnishes; the oak table, a rocking chair
the referee, a chess club, the champion; studies, offers; the endgame, a quiet draw
the programmer, a code reviewer, the compiler; rejects, simplifies; the recursive function, a type error
the historian, a local guide, the archive; dates, preserves; the town charter, a bundle of letters
the driver, a cyclist, the traffic warden; ignores, curses; the red light, a parked van
the merchant, a customs officer, the harbour master; inspects, taxes; the spice crates, a bale of cotton
the actor, a stage hand, the director; forgets, changes; the opening line, a heavy curtain
the geologist, a miner, the survey team; drills, samples; the granite slope, a vein of quartz
the swimmer, a lifeguard, the trainer; times, applauds; the last lap, a clean dive
the widow, a distant cousin, the notary; inherits, disputes; the country house, a string of pearls
"""
FRAMES = """
{}.
Nobody in the village knows why {}.
Is it true that {}?
{}, which came as a surprise to everyone who had read the report of the year before.
According to the morning paper, {}.
Whenever it rains, {}, although there is little to be gained by it and much to be lost!
I doubt that {} at all.
"He told me twice," she said, "that {}."
In the spring of 1987, {} for the first time.
Before anybody can answer, {}; then the room falls silent and the meeting is over.
{}, or so we think.
On Mondays {}, on Tuesdays there is nothing to do, and by Friday all of it has to be done again.
"""


def judged_text() -> list[str]:
    """240 sentences, 12 of each topic, of one and two clauses."""
    found = []
    for who, does, what in _topics(JUDGED):
        for place, words in enumerate(product(who, does, what)):
            sentence = " ".join(words)
            more = f", and {who[(place + 1) % 3].lower()} {does[place % 2]} {what[(place + 1) % 2]} until evening"
            found.append(f"{sentence}{more if place % 3 == 0 else ''}.")
    return found


def calibration_text() -> list[str]:
    """240 sentences of other topics, each of a topic in another frame, of five to twenty-eight words."""
    found = []
    for who, does, what in _topics(CALIBRATION):
        for frame, words in zip(FRAMES.strip().splitlines(), product(who, does, what), strict=True):
            sentence = frame.format(" ".join(words))
            found.append(sentence[0].upper() + sentence[1:])
    return found


def _topics(text: str) -> Iterator[list[list[str]]]:
    for line in text.strip().splitlines():
        yield [part.split(", ") for part in line.split("; ")]
