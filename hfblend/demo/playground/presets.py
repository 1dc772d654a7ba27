"""Chunks and questions that the playground offers to begin with; all written for hfblend."""

from __future__ import annotations

from dataclasses import dataclass

from ..demo import demo_data


@dataclass(frozen=True)
class Preset:
    """A name, chunks and a question about them."""

    name: str
    chunks: tuple[str, ...]
    question: str


def presets() -> tuple[Preset, ...]:
    """A question of the demo that SmolLM2-135M-Instruct answers right by full prefill and blended, and wrong by full
    reuse (notebook 1 says how it was found); then texts whose meaning hangs on what stands before them."""
    data = demo_data()
    passages = tuple(f"{p['title']}: {p['text']}" for p in (data["passages"][i] for i in (0, 5, 4, 1)))
    return (Preset("The island's flag", passages, data["questions"][3]["question"]), _REFERRING_BACK, _NEWER_NOTE)


_REFERRING_BACK = Preset(
    "Chunks that refer back",
    (
        "The barge Patient Heron carried grain between the lock at Dunmere and the mills of Ostley. She was built of "
        "larch in 1904, was painted green above the waterline and drew so little water that she could turn in the mill "
        "pond. Four people lived on board: the skipper, his wife, a deckhand and the cook.",
        "Her cook was a quiet man named Tobias Fenn. He baked twice a week in an iron stove beside the mast, and "
        "people on the towpath bought his rye loaves. He kept a notebook of every loaf that failed, with "
        "the weather of the day beside it.",
        "After the barge was sold he opened a bakery in the village of Little Carrow. The shop had a blue door and no "
        "sign, and it was closed on Thursdays, when he walked to the canal to look at the boats. His notebook still "
        "lies on the counter under a sheet of glass.",
        "The mills themselves stopped in 1931. One became a school, one a store for ropes, and the smallest fell into "
        "the pond during a storm. Children say that its wheel still turns under the ice in cold winters.",
    ),
    "In which village did the cook of the Patient Heron open a bakery?",
)

_NEWER_NOTE = Preset(
    "A note that corrects another",
    (
        "Note of the choir's secretary, 2 March. The spring concert takes place on Monday in the hall of the old "
        "customs house. Doors open at six. Singers bring their own music stands, because the hall has only nine.",
        "Note of the choir's secretary, 9 March. The hall that was named in the earlier note has a broken boiler. The "
        "concert is moved to Thursday and takes place in the chapel on Weaver Street. Everything else stays as it was "
        "announced.",
        "Note of the caretaker, 10 March. The chapel has forty chairs and a stove that needs an hour to warm the room. "
        "Whoever comes first lights it. The key hangs behind the notice board, and it sticks a little.",
    ),
    "On which day does the spring concert take place?",
)
