"""What `tune_pv` reports: each round while it runs, and the whole at the end."""

from dataclasses import dataclass

__all__ = ["PVReport", "PVRound"]


@dataclass(frozen=True)
class PVRound:
    """One round of `tune_pv`.

    Attributes:
        step: steps done at its end.
        steps: steps in all.
        training: mean loss of its steps, in nats a token.
        validation: loss on the batches held out after them.
        changed: share of the model's quantized groups whose codes were changed afterwards.
        seconds: wall time.
    """

    step: int
    steps: int
    training: float
    validation: float
    changed: float
    seconds: float


@dataclass(frozen=True)
class PVReport:
    """What `tune_pv` did.

    Attributes:
        loss_before: mean loss on the batches held out before tuning, in nats a token: divergence from the teacher, or
            negative log likelihood without one.
        loss_after: the same of the state that was kept.
        rounds: each round.
        changed: for each layer the share of groups that have other codes than before.
        seconds: wall time, that of runs which this one resumed included.
        peak_memory: bytes; most that torch had allocated on the model's GPUs since tuning began (torch's peak counters
            are reset for it), or the process's peak resident memory for a model on the CPU.
    """

    loss_before: float
    loss_after: float
    rounds: tuple[PVRound, ...]
    changed: dict[str, float]
    seconds: float
    peak_memory: int

    def __str__(self) -> str:
        steps = self.rounds[-1].step if self.rounds else 0
        shares = sorted(self.changed.values())
        work = f"{steps} steps in {len(self.rounds)} rounds, {self.seconds:.1f} s"
        lines = [
            f"loss on held-out batches {self.loss_before:.4f} -> {self.loss_after:.4f} nats a token",
            f"{work}, peak memory {self.peak_memory / 1e9:.2f} GB",
        ]
        if shares:
            lines.append(
                f"codes changed in {100 * sum(shares) / len(shares):.2f} % of a layer's groups on average "
                f"({100 * shares[0]:.2f} to {100 * shares[-1]:.2f} %)"
            )
        return "\n".join(lines)
