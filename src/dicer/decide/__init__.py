"""What stays, and how much?"""
