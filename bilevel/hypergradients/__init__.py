"""Ways to estimate d outer_loss / d outer: one file each, one signature for all, exported by `bilevel`."""
