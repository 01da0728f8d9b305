"""From a name to checked weights, and what is kept of them: in memory, and on this machine."""
