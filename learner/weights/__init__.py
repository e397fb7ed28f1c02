"""From the trainer's parameters to the actors: snapshot, epochs, publisher."""
