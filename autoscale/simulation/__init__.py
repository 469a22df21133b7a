"""A cluster that exists only as numbers: replays a request trace against a policy. `SIMULATOR.md` has the formulas."""
