"""The algorithms, one readable file each: transforms keep the float function, quantizers turn one weight into codes."""
