"""What a reproduction trains and compares: methods, variants of the training, tables.

    python eval.py --reproduce 9 beta      # names of tables; what each holds: experiments.yaml

The tables of the paper's section 3 and our own beside them (serving, beyond, beta).
"""

from dataclasses import dataclass

from files import read_yaml

MAIN = ""  # the variant with the settings as they are
ONLINE = ("PE", "SFT", "SFT+DPO", "IceBreaker")  # arms beside the deployed retrieval
SEARCHED = ("SFT", "IceBreaker")  # of these also what list search finds among ab.searched lists


@dataclass(frozen=True)
class Method:
    """Who writes (a saved adapter of a variant's run) from what (which interests)."""

    adapter: str  # as Run.adapter names it: "" the base, "sit", "vanilla", "round1", ..., "last"
    interests: str = "RID"  # "RID", "all" (latest first) or "rule"
    variant: str = MAIN


@dataclass(frozen=True)
class Table:
    title: str
    methods: tuple[str, ...] = ()  # its rows
    variants: tuple[str, ...] = ()  # whose runs it needs beside the main one
    against: str = "PE"  # with what R-User and R-Score compare
    chosen: tuple[str, ...] = ()  # what is chosen from the lists of each of SEARCHED
    note: str = ""  # of what stands below the table, or in its place
    head: tuple[str, ...] = ()  # titles of that, and what it shows:
    rows: tuple[str, ...] = ()
    columns: tuple[tuple[str, str], ...] = ()  # (method, {} for the row; metric)


def read(name: str = "experiments") -> dict:
    """What experiments.yaml or claims.yaml holds."""
    return read_yaml(f"tables/{name}.yaml")


def methods() -> dict[str, Method]:
    return {name: Method(**fields) for name, fields in read()["methods"].items()}


def tables() -> dict[str, Table]:
    """Name of --reproduce -> table, in the order of the report."""
    return {name: Table(**fields) for name, fields in read()["tables"].items()}


def rows_of(table: Table) -> list[str]:
    """The methods of a table, in order; IceBreaker first where others choose from its lists."""
    chosen = [f"{method}, {choice}" for method in SEARCHED for choice in table.chosen]
    return [*["IceBreaker"] * bool(chosen), *chosen, *table.methods]
