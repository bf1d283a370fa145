"""Is a written checkpoint what was decided, and does it open elsewhere?"""
