"""What does the text do in the model?"""
