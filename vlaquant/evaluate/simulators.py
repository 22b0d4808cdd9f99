"""The simulators that ``--env`` knows by name, and what of each is driven."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlaquant.errors import RecipeError
from vlaquant.evaluate import gym, libero, metaworld
from vlaquant.evaluate.environment import Environment


@dataclass(frozen=True, slots=True)
class Simulator:
    """Where episodes run; hashable, and small enough to be sent to other processes.

    Attributes:
        kind: a key of :data:`KINDS`.
        name: of a suite, a task or an environment, as its kind has them; empty for all.
        options: (key, value) pairs of ``--env-option``.
    """

    kind: str = "metaworld"
    name: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}" if self.name else self.kind

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of what is driven."""
        return KINDS[self.kind].tasks(self.name)

    @property
    def max_steps(self) -> int:
        """Steps after which an episode has failed, if nobody says otherwise."""
        return KINDS[self.kind].max_steps(self)

    def why_not(self) -> str | None:
        """Why it cannot run on this machine; None if it can."""
        return KINDS[self.kind].why_not()

    def make(self, task: str, image_size: int) -> Environment:
        """One of its tasks.

        Args:
            task: one of :attr:`tasks`.
            image_size: side of the square images that the policy would like, in pixels.
        """
        return KINDS[self.kind].make(self, task, image_size)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of simulator; functions of what :class:`Simulator` says."""

    tasks: Callable[[str], tuple[str, ...]]
    why_not: Callable[[], str | None]
    max_steps: Callable[[Simulator], int]
    make: Callable[[Simulator, str, int], Environment]


def _metaworld_tasks(name: str) -> tuple[str, ...]:
    if name and name not in metaworld.INSTRUCTIONS:
        known = ", ".join(metaworld.INSTRUCTIONS)
        raise RecipeError(f"--env metaworld:{name}: unknown task; known tasks: {known}")
    return (name,) if name else tuple(metaworld.INSTRUCTIONS)


def _libero_tasks(name: str) -> tuple[str, ...]:
    suite, _, task = name.partition("/")
    known = libero.tasks(suite)
    if task and task not in known:
        raise RecipeError(f"--env libero:{name}: no such task; {suite} has {', '.join(known)}")
    return (task,) if task else known


def _suite(simulator: Simulator) -> str:
    return simulator.name.partition("/")[0]


def _gym_steps(simulator: Simulator) -> int:
    env = gym.GymEnvironment(simulator.name, dict(simulator.options))
    try:
        found = env.max_steps
    finally:
        env.close()
    if found is None:
        raise RecipeError(f"{simulator}: never ends an episode; say after how many steps one has failed (--max-steps)")
    return found


#: Adding a simulator is a line here, and an :class:`~vlaquant.evaluate.environment.Environment`.
KINDS: dict[str, Kind] = {
    "metaworld": Kind(
        _metaworld_tasks,
        metaworld.why_not,
        lambda _: metaworld.MAX_STEPS,
        lambda _, task, size: metaworld.MetaWorldTask(task, size),
    ),
    "gymnasium": Kind(
        lambda name: (name,),
        gym.why_not,
        _gym_steps,
        lambda simulator, task, _: gym.GymEnvironment(task, dict(simulator.options)),
    ),
    "libero": Kind(
        _libero_tasks,
        libero.why_not,
        lambda simulator: libero.max_steps(_suite(simulator)),
        lambda simulator, task, _: libero.LiberoTask(_suite(simulator), task, dict(simulator.options)),
    ),
}
METAWORLD = Simulator()


def parse_simulator(text: str, options: Sequence[str] = ()) -> Simulator:
    """What ``--env KIND[:NAME]`` and ``--env-option KEY=VALUE`` mean.

    Raises:
        RecipeError: no such kind, an option without value, or no name where one is needed.
    """
    kind, _, name = text.partition(":")
    if kind not in KINDS:
        raise RecipeError(f"--env {text}: unknown simulator {kind!r}; known: {', '.join(KINDS)}")
    if kind != "metaworld" and not name:
        raise RecipeError(f"--env {kind}: says not which; write {kind}:NAME")
    pairs = [one.partition("=") for one in options]
    for key, equals, _ in pairs:
        if not key or not equals:
            raise RecipeError(f"--env-option {key}: write KEY=VALUE")
    if kind == "metaworld" and pairs:
        raise RecipeError(f"--env-option {pairs[0][0]}: metaworld has no options")
    return Simulator(kind, name, tuple((key, value) for key, _, value in pairs))
