"""From a checkpoint to a model: built on the meta device, FFNs swapped, weights streamed in; and packs written."""
