"""Write shop.csv (20,000 rows, semicolons) and products.csv, as a shop exports them."""

import numpy as np
import pandas as pd

rng = np.random.default_rng(7)
n, items = 20_000, 200
ids = np.array([f"{i:05d}" for i in range(100, 100 + items)])
price, brand = rng.lognormal(3, 0.6, items).round(2), rng.choice(["ada", "bee", "cor"], items)
age, country = rng.integers(18, 80, n), rng.choice(["DE", "FR", "US"], n, p=[0.5, 0.3, 0.2])
taste = 0.03 * (age[:, None] - 45) * np.linspace(-1, 1, items)
taste = taste + (country[:, None] == "FR") * (brand == "bee")
p = np.exp(0.5 * taste)
p = 0.9 * p / p.sum(1, keepdims=True) + 0.1 / items
shown = (p.cumsum(1) > rng.random((n, 1))).argmax(1)
row = np.arange(n)
click = rng.random(n) < 1 / (1 + np.exp(2.0 - taste[row, shown]))
stamp = pd.Timestamp("2026-03-01") + pd.to_timedelta(
    np.sort(rng.integers(0, 30 * 86400, n)), unit="s"
)
pd.DataFrame(
    {
        "user_id": rng.integers(0, 4000, n),
        "age": age,
        "country": country,
        "item": ids[shown],
        "click": click.astype(int),
        "propensity": p[row, shown],
        "time": stamp.strftime("%Y-%m-%d %H:%M:%S"),
    }
).to_csv("shop.csv", sep=";", index=False)
pd.DataFrame({"item_id": ids, "price": price, "brand": brand}).to_csv(
    "products.csv", sep=";", index=False
)
