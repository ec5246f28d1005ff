"""Colors and markers of charts."""

INK, FAINT, BAND = "#222222", "#8a8a8a", "#e8e8e8"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
