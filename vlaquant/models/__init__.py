"""Model classes that we must provide ourselves."""
