"""What `simulate` found: cycles, energy, area, utilisation and stalls, by engine and by step."""

from __future__ import annotations

from collections.abc import Mapping as Table
from collections.abc import Sequence
from dataclasses import dataclass

from vitrify.accelerator.hardware import Hardware
from vitrify.accelerator.placement import Mapping, Placement
from vitrify.accelerator.program import Job, Queue


@dataclass(frozen=True)
class OperationCost:
    """One placement: the cycle at which its first job starts and the last result is ready, cycles of its engine, pJ."""

    id: str
    module: str
    step: str
    engine: str
    start: int
    end: int
    busy: int
    pj: float


@dataclass(frozen=True)
class Result:
    """A workload on an accelerator.

    cycles          from the first load to the last result
    queues          what each engine and the DRAM did: busy cycles, cycles idle by reason ("operand", "dram"), cycles
                    lost to the SRAM port
    energy_pj       by component: each engine, "registers", "sram", "noc", "dram"
    area_mm2        by component: each engine and "sram"
    bits            moved, by level: "dram read", "dram write", "sram read", "sram write", "noc"
    macs            products done, by engine
    operations      one for each placement, in order
    jobs            with their times: what `trace` draws
    notes           what a reader must know: synthetic masks, operators that nobody charged
    """

    model: str
    hardware: Hardware
    mapping: Mapping
    cycles: int
    queues: Table[str, Queue]
    energy_pj: Table[str, float]
    area_mm2: Table[str, float]
    bits: Table[str, float]
    macs: Table[str, float]
    operations: Sequence[OperationCost]
    placements: Sequence[Placement]
    jobs: Sequence[Job]
    notes: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """The latency of one forward pass."""
        return self.cycles / (self.hardware.clock_mhz * 1e6)

    @property
    def total_pj(self) -> float:
        """The energy of one forward pass, DRAM included; `total_pj - energy_pj["dram"]` is the chip's own."""
        return sum(self.energy_pj.values())

    @property
    def total_mm2(self) -> float:
        """The area of engines and SRAM."""
        return sum(self.area_mm2.values())

    @property
    def utilisation(self) -> dict[str, float]:
        """The share of each array's PEs, and of each lane engine's time, that did work, over the whole run."""
        found = {}
        for name, queue in self.queues.items():
            if name in self.hardware.arrays:
                found[name] = self.macs.get(name, 0.0) / (self.hardware.arrays[name].pes * max(self.cycles, 1))
            else:
                found[name] = queue.busy / max(self.cycles, 1)
        return found

    @property
    def attention_cycles(self) -> int:
        """The time during which attention's own steps run: their spans, from first start to last end, merged."""
        spans = sorted((o.start, o.end) for o in self.operations if o.step and o.engine)
        total, until = 0, 0
        for start, end in spans:
            total += max(0, end - max(start, until))
            until = max(until, end)
        return total

    def trace(self) -> dict[str, object]:
        """Return a timeline as Perfetto and chrome://tracing read it: `json.dump` it to a file and open that."""
        from vitrify.accelerator.trace import trace  # noqa: PLC0415  (trace needs Result)

        return trace(self)

    def __str__(self) -> str:
        """The totals, and a line for each engine, in plain text."""
        lines = [
            f"{self.model} on {self.hardware.title}: {self.cycles:,} cycles, {self.seconds * 1e3:.4g} ms, "
            f"{self.total_pj * 1e-9:.4g} mJ ({self.energy_pj['dram'] * 1e-9:.4g} DRAM), {self.total_mm2:.3g} mm2",
            f"{'':18}{'busy':>8}{'of peak':>9}{'operand':>9}{'DRAM':>8}{'port':>8}{'mJ':>10}{'mm2':>8}",
        ]
        told: set[str] = set()
        for name, queue in self.queues.items():
            idle = {reason: cycles / max(self.cycles, 1) for reason, cycles in queue.idle.items()}
            engine = name.partition(" ")[0]  # the units of a lane engine have queues of their own, its energy is one
            costs = (
                "" if engine in told else f"{self.energy_pj[engine] * 1e-9:10.4f}{self.area_mm2.get(engine, 0):8.3f}"
            )
            told.add(engine)
            lines.append(
                f"{name:18}{queue.busy / max(self.cycles, 1):8.1%}{self.utilisation[name]:9.1%}{idle['operand']:9.1%}"
                f"{idle['dram']:8.1%}{queue.port / max(self.cycles, 1):8.1%}{costs}"
            )
        for name in ("registers", "sram", "noc"):
            lines.append(f"{name:60}{self.energy_pj[name] * 1e-9:10.4f}{self.area_mm2.get(name, 0):8.3f}")
        return "\n".join([*lines, *self.notes])
