"""From files on disk to tensors: finding, checking, fitting, augmenting, caching, preparing and making scans."""
