"""The nouns that everything else speaks. Imports torch and the standard library only."""
