"Files and drawing: what knows nothing of learning"
