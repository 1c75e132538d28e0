"""What a pretrained model is good for: retrieval, recognition, text-guided retrieval of images.

The tasks are those of the papers on fashion data; ``python -m reference.evaluate`` runs them on any
model that offers `reference.model.DualEncoder`, without training the model further.
"""
