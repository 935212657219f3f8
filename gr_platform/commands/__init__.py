"""What the commands of `gr` do; each module is one command or what several of them show and ask."""
