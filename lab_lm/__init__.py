"A notebook-first laboratory for language models of low-resource languages"
