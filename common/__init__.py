"""Small pieces that every room uses: files, settings, chat messages. Imports nothing heavy."""
