"""What two runs of the same settings have in common."""

import json

from groupdetr_fast.training.checkpoint import latest_checkpoint, read_checkpoint


def outcome(folder):
    """What a finished run leaves, but for times and memory: weights, epochs, metrics, distances, random state."""
    weights, state = read_checkpoint(latest_checkpoint(folder))
    epochs = json.loads((folder / "results.json").read_text())["epochs"]
    rows = [{name: row[name] for name in row.keys() - {"seconds", "peak_memory_mib"}} for row in epochs]
    distances = folder / "distances.csv"
    return {
        "weights": {name: tensor.tolist() for name, tensor in weights.items()},
        "epochs": rows,
        "measured": (folder / "measured.json").read_text(),
        "distances": distances.read_text() if distances.exists() else None,
        "random": [each["torch"].tolist() for each in state["random"]],
    }
