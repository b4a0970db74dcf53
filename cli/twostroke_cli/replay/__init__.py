"""`twostroke replay`: recorded loads against simulated workers, placed by the routers' own code."""
