"""The modes: how seats are formed and how outcomes become rewards."""
