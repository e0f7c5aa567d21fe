"""Does it help on my data? The same recipe in several arms, paired by seed, with honest intervals."""
