"""Property tests here are quick; that a busy machine makes one example slow is no failure."""

from hypothesis import settings

settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
