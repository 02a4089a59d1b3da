"""What a process started, by /proc."""

from pathlib import Path


def below(pid: int) -> list[int]:
    """Processes that a process started, and those that they started, by their numbers; nothing
    of what ended meanwhile.
    """
    try:
        children = [
            int(c)
            for task in Path(f"/proc/{pid}/task").glob("*")
            for c in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return sorted(p for child in children for p in [child, *below(child)])
