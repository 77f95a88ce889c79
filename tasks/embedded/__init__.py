"""The embedded models: a very small vision-language model and a very small CLIP, and the script that trains both."""
