"""An oracle as a user writes one; named in own_function.yaml."""


def melting_score(sequences: list[str]) -> list[float]:
    """Closeness, in 0..1, of the melting temperature by the Wallace rule (2 °C per A or T, 4 per G or C) to 26 °C."""
    temperatures = (2 * len(s) + 2 * (s.count("G") + s.count("C")) for s in sequences)
    return [max(0.0, 1 - abs(t - 26) / 20) for t in temperatures]
