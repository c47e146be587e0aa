"""From files on disk to tensors: finding, checking, fitting, augmenting and caching scans."""
