"A notebook-first laboratory for language models of low-resource languages"

__version__ = "0.1.0"
