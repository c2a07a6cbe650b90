"""The PyTorch definition of everything that is learnt: DiT, attention, ring cache, autoencoder. The truth that every
engine is compared with. Importing it imports torch; `import cfrt` does not."""
