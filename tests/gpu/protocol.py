"""Whether a persistent kernel of the LSTM can go wrong in any order of its steps.

The kernel's own sources run once on the CPU (cuda_on_cpu/trace.cpp) and leave a record: what every
warp reads and writes in shared memory and in what a grid exchanges, what it sends, arms and waits
for. :func:`program_of` makes of it the steps of every warp, :func:`explore` tries every order that
a GPU may take: warps in any order; messages that arrive late, in any order, before their mbarrier
is armed or while others read.

A *use* is a message, or what one warp reads and writes between two of its actions. Two uses
conflict if they touch the same word and one of them writes. In every order those must not overlap,
and must follow each other as in the record, whose numbers are right (test_cuda_on_cpu.py).

What the hardware does with an mbarrier is not in the sources and stands here: one arrival and all
bytes complete a phase, bytes may come first, a wait tells phases by their parity. A message is what
a warp sends to one block at a time. The lanes of a warp are one: the sanitizers watch them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

Warp = tuple[int, int]  # block and warp
Word = tuple[int, int]  # block, or -1 for what a grid exchanges, and 4 bytes of its memory
TOGETHER = {"block", "cluster", "wait", "warp"}  # what all lanes of a warp do
TOUCHING = {"read", "final", "write"}
WAITING = {"block", "cluster", "wait", "poll"}  # what other warps did before may be seen after it


class Event(NamedTuple):
    """A line of the record; ``at`` is its place there."""

    at: int
    warp: Warp
    lane: int
    what: str
    numbers: tuple[int, ...]

    def words(self) -> Iterator[Word]:
        """Those that a read, a write or a message touches."""
        where, begin, size = self.numbers[:3]
        if self.what != "send":
            where = self.warp[0] if where == 0 else -1
        return ((where, word) for word in range(begin // 4, (begin + size + 3) // 4))


@dataclass
class Use:
    """The words that were touched, and at which places in the record."""

    name: str
    touched: list[tuple[int, Word, bool]] = field(default_factory=list)  # True: written

    def touch(self, event: Event) -> None:
        """Adds what an event reads or writes."""
        written = event.what in ("write", "send")
        self.touched += [(event.at, word, written) for word in event.words()]


@dataclass
class Message(Use):
    """What a warp sends to one block, and the mbarrier that counts its bytes there."""

    block: int = 0
    mbarrier: int = 0
    size: int = 0


@dataclass
class Action:
    """What a warp does beside reading and writing.

    ========  ==================================================  =========================
    what                                                          numbers
    ========  ==================================================  =========================
    block     waits for the other warps of the block              site of the barrier
    cluster   waits for all warps                                 site
    expect    arms an mbarrier                                    mbarrier, bytes
    send      ``messages``
    wait      until a round of an mbarrier is complete            mbarrier, round
    add       1 to the counter of the grid
    poll      until the counter has at least a value              value
    end       leaves
    ========  ==================================================  =========================
    """

    what: str
    numbers: tuple[int, ...] = ()
    messages: dict[tuple[int, int], Message] = field(default_factory=dict)  # by block and mbarrier


@dataclass
class Steps:
    """Of a warp: ``uses[k]``, which may be empty, lies before ``actions[k]``; the last is "end"."""

    warp: Warp
    uses: list[Use] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)

    def act(self, action: Action) -> None:
        """Adds an action and the use that follows."""
        self.actions.append(action)
        self.uses.append(Use(f"use {len(self.uses)} of {self.warp}"))

    def every_use(self) -> Iterator[Use]:
        """Those between actions, and what the actions send."""
        yield from self.uses
        for action in self.actions:
            yield from action.messages.values()


Program = dict[Warp, Steps]


def program_of(record: str) -> Program:
    """The steps of every warp."""
    lanes: dict[Warp, list[deque[Event]]] = defaultdict(lambda: [deque() for _ in range(32)])
    for event in needed(parse(record)):
        lanes[event.warp][event.lane].append(event)
    return {warp: merged(warp, lanes[warp]) for warp in sorted(lanes)}


def parse(record: str) -> list[Event]:
    """The events, without the stores by which trace.cpp delivers a message to the same block."""
    events, delivered = [], {}
    for at, line in enumerate(record.splitlines()):
        block, thread, what, *numbers = line.split()
        event = Event(at, (int(block), int(thread) // 32), int(thread) % 32, what,
                      tuple(map(int, numbers)))  # fmt: skip
        lane = event.warp, event.lane
        if what == "send":
            delivered[lane] = set(event.words())
        elif what == "write" and delivered.get(lane, set()).issuperset(event.words()):
            continue
        else:
            delivered.pop(lane, None)
        events.append(event)
    return events


def needed(events: list[Event]) -> Iterator[Event]:
    """Of what a warp reads and nothing writes any more, the first time only: final."""
    written: dict[Word, int] = {}
    for event in events:
        if event.what in ("write", "send"):
            written |= dict.fromkeys(event.words(), event.at)
    known: set[tuple[Warp, Word]] = set()
    for event in events:
        if event.what == "read":
            read = {(event.warp, word) for word in event.words()}
            if all(event.at > written.get(word, -1) for _, word in read):
                if read <= known:
                    continue
                known |= read
                event = event._replace(what="final")
        yield event


def merged(warp: Warp, lanes: list[deque[Event]]) -> Steps:
    """One warp from its lanes. Between what all lanes do together they act first where they may."""
    steps = Steps(warp, [Use(f"what {warp} begins with")])
    seeing = steps.uses[0]  # nothing more is to be seen since: what is final is as well read there
    while heads := [lane[0] for lane in lanes if lane]:
        kinds = {event.what for event in heads}
        if "send" in kinds:
            if not steps.actions or not steps.actions[-1].messages or steps.uses[-1].touched:
                steps.act(Action("send"))
            send(steps.actions[-1], warp, lanes)
        elif alone := kinds - TOGETHER - TOUCHING:
            (event,) = (lane.popleft() for lane in lanes if lane and lane[0].what in alone)
            steps.act(Action(event.what, event.numbers))
        elif kinds & TOUCHING:
            for lane in lanes:
                while lane and lane[0].what in TOUCHING:
                    event = lane.popleft()
                    (seeing if event.what == "final" else steps.uses[-1]).touch(event)
        else:
            (same,) = {lane.popleft()[3:] for lane in lanes}
            if same[0] != "warp":
                steps.act(Action(*same))
        if steps.actions and steps.actions[-1].what in WAITING:
            seeing = steps.uses[-1]
    steps.actions.append(Action("end"))
    return steps


def send(action: Action, warp: Warp, lanes: list[deque[Event]]) -> None:
    """Adds what the lanes send until they do something else."""
    for lane in lanes:
        while lane and lane[0].what == "send":
            event = lane.popleft()
            block, _, size, mbarrier = event.numbers
            made = Message(f"a message of {warp} to block {block}", [], block, mbarrier)
            message = action.messages.setdefault((block, mbarrier), made)
            message.size += size
            message.touch(event)
            message.touched.append((event.at, (block, mbarrier // 4), False))  # it has to be there


def conflicts(program: Program) -> dict[int, set[int]]:
    """By the id of a use: those that have to end before it begins."""
    uses = [use for steps in program.values() for use in steps.every_use()]
    touched = [(*touch, id(use)) for use in uses for touch in use.touched]
    before: dict[int, set[int]] = {id(use): set() for use in uses}
    writer: dict[Word, int] = {}
    readers: dict[Word, set[int]] = defaultdict(set)
    for _, word, written, use in sorted(touched):
        if word in writer:
            before[use].add(writer[word])
        if written:
            before[use] |= readers.pop(word, set())
            writer[word] = use
        else:
            readers[word].add(use)
    return before


class Fault(Exception):
    """What can go wrong."""


class State(NamedTuple):
    """Everything that the next steps depend on; bit k of a set says whether use k is in it."""

    at: tuple[int, ...]  # of every warp, the action that is next
    flying: int  # messages
    arrived: int
    mbarriers: tuple[tuple[int, int, int], ...]  # phase, arrivals and bytes that are missing
    counter: int


class Machine:
    """A program, and what may happen next."""

    def __init__(self, program: Program) -> None:
        self.steps = list(program.values())
        every = [use for steps in self.steps for use in steps.every_use()]
        bits = {id(use): 1 << k for k, use in enumerate(every)}
        self.name = {bits[id(use)]: use.name for use in every}
        self.messages = {bits[id(x)]: x for x in every if isinstance(x, Message)}
        self.bit = {id(x): bit for bit, x in self.messages.items()}
        # Sets of uses: what has to end before each, and what has ended when a warp is at an action.
        of_warp = {id(x): sum(bits[id(y)] for y in steps.uses)
                   for steps in self.steps for x in steps.uses}  # fmt: skip
        self.before = {
            use: sum(bits[x] for x in others) & ~of_warp.get(use, bits[use])
            for use, others in conflicts(program).items()
        }
        self.ended = [
            [*accumulate((bits[id(x)] for x in steps.uses), initial=0)] for steps in self.steps
        ]
        armed = {(steps.warp[0], x.numbers[0]) for steps in self.steps for x in steps.actions
                 if x.what in ("expect", "wait")}  # fmt: skip
        self.place = {mbarrier: k for k, mbarrier in enumerate(sorted(armed))}

    def start(self) -> State:
        state = State((0,) * len(self.steps), 0, 0, ((0, 1, 0),) * len(self.place), 0)
        for steps in self.steps:
            self.begin(state, steps.uses[0])
        return state

    def action(self, state: State, w: int) -> Action | None:
        """The next one of a warp."""
        actions = self.steps[w].actions
        return actions[state.at[w]] if state.at[w] < len(actions) else None

    def begin(self, state: State, use: Use) -> None:
        """Raises if a use that has to come first has not ended."""
        ended = state.arrived
        for at, of_warp in zip(state.at, self.ended, strict=True):
            ended |= of_warp[at]
        if missing := self.before[id(use)] & ~ended:
            raise Fault(f"{use.name} may begin before the end of {self.name[missing & -missing]}")

    def following(self, state: State) -> Iterator[State]:
        """What may come next."""
        actions = [self.action(state, w) for w in range(len(self.steps))]
        there = {steps.warp[0] for steps, action in zip(self.steps, actions, strict=True) if action}
        for bit, message in self.messages.items():
            if state.flying & bit:
                if message.block not in there:
                    raise Fault(f"{message.name} comes after all of that block has left")
                k = self.place[message.block, message.mbarrier]
                state_then = self.count(state, k, 0, -message.size)
                yield state_then._replace(flying=state.flying - bit, arrived=state.arrived | bit)
        for w, action in enumerate(actions):
            if action and (together := self.ready(state, w, action, actions)):
                yield self.act(state, together, action)

    def count(self, state: State, k: int, arrivals: int, size: int) -> State:
        """Adds to what an mbarrier misses."""
        phase, arrivals, size = (
            x + y for x, y in zip(state.mbarriers[k], (0, arrivals, size), strict=True)
        )
        if arrivals < 0:
            raise Fault(f"the mbarrier {list(self.place)[k]} is armed twice in a phase")
        if arrivals == size == 0:
            phase, arrivals = phase + 1, 1
        of_k = (phase, arrivals, size)
        return state._replace(mbarriers=(*state.mbarriers[:k], of_k, *state.mbarriers[k + 1 :]))

    def ready(
        self, state: State, w: int, action: Action, actions: list[Action | None]
    ) -> list[int]:
        """The warps that may now take the action of warp w together; the first speaks for all."""
        block, what = self.steps[w].warp[0], action.what
        if what in ("block", "cluster"):
            met = [
                v
                for v, steps in enumerate(self.steps)
                if what == "cluster" or steps.warp[0] == block
            ]
            return met if w == met[0] and all(actions[v] == action for v in met) else []
        if what == "wait":
            mbarrier, round_ = action.numbers[:2]
            phase = state.mbarriers[self.place[block, mbarrier]][0]
            if phase % 2 == round_ % 2:
                return []
            if phase != round_ + 1:
                raise Fault(f"{self.steps[w].warp} waits for round {round_} and sees phase {phase}")
        if what == "poll" and state.counter < action.numbers[0]:
            return []
        return [w]

    def act(self, state: State, together: list[int], action: Action) -> State:
        """The state after an action; what begins then may begin."""
        if action.what == "expect":
            k = self.place[self.steps[together[0]].warp[0], action.numbers[0]]
            state = self.count(state, k, -1, action.numbers[1])
        at = tuple(x + (w in together) for w, x in enumerate(state.at))
        state = state._replace(at=at, counter=state.counter + (action.what == "add"))
        for message in action.messages.values():
            self.begin(state, message)
            state = state._replace(flying=state.flying | self.bit[id(message)])
        for w in together:
            if action.what != "end":
                self.begin(state, self.steps[w].uses[at[w]])
        return state


def explore(program: Program) -> int:
    """How many states there are; raises :class:`Fault` in the first that can go wrong."""
    machine = Machine(program)
    found = {machine.start()}
    todo = list(found)
    while todo:
        state = todo.pop()
        following = set(machine.following(state))
        waiting = {steps.warp: action.what for w, steps in enumerate(machine.steps)
                   if (action := machine.action(state, w))}  # fmt: skip
        if waiting and not following:
            raise Fault(f"all wait for each other: {waiting}")
        todo += following - found
        found |= following
    return len(found)
