"""Numbers for tables that people read."""


def digits(value: float) -> str:
    """`value` with four digits and no positive exponent: ``118.7``, ``0.2872``, ``370,912``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
