"""What a fit is: a layout, what follows from it, and why."""

from __future__ import annotations

from trainer.memory import Layout, Usage

NAMES = {"single": "one GPU", "ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


class Fit(Layout):
    """How to run: `processes` x `micro_batch` x `accumulation` is the recipe's global batch, exactly."""

    accumulation: int
    """Micro batches to an optimizer step."""
    threads: int
    """Of the CPU, for each process; a resume is exact only with as many as before."""
    use_cpu: bool
    gpu: Usage = Usage()
    """Predicted peak of each GPU; no terms on the CPU."""
    host: Usage = Usage()
    """Predicted peak of each node's own memory; no terms if the model's numbers are not known."""
    reasons: tuple[str, ...]

    @property
    def offloaded_gib(self) -> float:
        """Of each node's memory, for what DeepSpeed keeps there."""
        return sum(each.gib for each in self.host.terms if each.name.startswith("offloaded"))

    def words(self) -> str:
        """For a table: `ZeRO-3, micro batch 4 x 2, no offload`."""
        batch = f"micro batch {self.micro_batch} x {self.accumulation}"
        if self.use_cpu:
            return ", ".join(["CPU", *[NAMES[self.engine]] * self.is_sharded, batch])
        recomputed = [] if self.activation_checkpointing else ["no checkpointing"]
        return ", ".join([NAMES[self.engine], batch, *recomputed, self.offload_words()])

    def offload_words(self) -> str:
        if self.offload_parameters:
            return "optimizer and parameters offloaded"
        return "optimizer offloaded" if self.offload_optimizer else "no offload"
