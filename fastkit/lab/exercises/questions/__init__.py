"""The notebooks' questions, a file each, under the name of the notebook: a list QUESTIONS."""
