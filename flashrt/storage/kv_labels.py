def read_labels(pack):
    raise NotImplementedError
