"""How fast training is, and where its time goes: one step, the data alone, and the real loop."""
