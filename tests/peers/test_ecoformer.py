"""KSH against EcoFormer's hashing (NeurIPS 2022), stated here once more from its formulas, on random tokens.

Where we differ from the released code, on purpose:
- The kernel's width is fixed by the fit. There it is the mean distance of each image's tokens, so that a token's code
  depends on the other tokens of its image. On the image of the fit, alone, the two are the same, and so are the codes.
- A projection of exactly 0 gives no bit; there sign(0) = 0, a third code.
- Queries and keys may have a hash each, fitted together. There they share the hash and the projection before it.
- Similarity is q.k, which attention sees; there tokens are scaled to length 1 first.
- A bit starts from the leading eigenvector, as in KSH (Liu et al., CVPR 2012), and takes 100 steps of Adam; there it
  starts at random and takes 100 small steps of SGD.
"""

from __future__ import annotations

import torch

from vitrify.nn import KSH

BITS, ANCHORS = 16, 25


def tokens(images, count, *, seed, heads=2, dim=32):
    return torch.randn(images, heads, count, dim, generator=torch.Generator().manual_seed(seed))


def ecoformer_kernel(x, anchors, width):
    """exp(-|x - a|^2 / (2 width)), differences written out: (B, H, N, A)."""
    return torch.exp(-(x[:, :, :, None] - anchors[None, :, None]).square().sum(-1) / (2 * width))


def ecoformer_labels(x, pairs=10):
    """+1 for the `pairs` largest products of each row, -1 for the smallest."""
    products = torch.einsum("bhid,bhjd->bhij", x, x)
    ranks = products.argsort(-1).argsort(-1)
    return (ranks >= x.shape[2] - pairs).float() - (ranks < pairs).float()


def ecoformer_fit(features, labels):
    """One bit after another: 100 steps of SGD from a random start on the softened codes, kept if the codes improve.

    features (B, H, N, A) centred, labels (B, H, N, N) -> weights (H, A, bits).
    """
    heads, anchors = features.shape[1], features.shape[3]
    start = torch.randn(heads, BITS, anchors, generator=torch.Generator().manual_seed(0))
    residual = labels * BITS
    weights = []

    def loss(y):
        return -torch.einsum("bhn,bhnm,bhm->bh", y, residual, y).mean() / (y.shape[2] * BITS)

    def codes(a):
        return torch.where(torch.einsum("bhna,ha->bhn", features, a) > 0, 1.0, -1.0)

    for bit in range(BITS):
        a = start[:, bit].clone().requires_grad_()
        optimizer = torch.optim.SGD([a], lr=5e-4, momentum=0.9, nesterov=True)
        for _ in range(100):
            optimizer.zero_grad()
            loss(2 * torch.sigmoid(torch.einsum("bhna,ha->bhn", features, a)) - 1).backward()
            optimizer.step()
        kept = a.detach() if loss(codes(a.detach())) < loss(codes(start[:, bit])) else start[:, bit]
        y = codes(kept)
        residual = residual - y[..., :, None] * y[..., None, :]
        weights.append(kept)
    return torch.stack(weights, -1)


def agreement(codes, labels):
    """Correlation of code products with the labels: 1 if similar pairs share all bits and dissimilar ones none."""
    products = codes @ codes.mT
    return ((products * labels).sum() / (products.norm() * labels.norm())).item()


def fitted(x):
    hashing = KSH(2, 32, codes="sign")
    hashing.fit_(x, x)
    return hashing


def test_codes_are_ecoformers_for_the_same_anchors_and_weights():
    hashing = fitted(tokens(8, 40, seed=0))
    x = tokens(5, 30, seed=1)
    features = ecoformer_kernel(x, hashing.anchors, hashing.width) - hashing.mean
    projections = torch.einsum("bhna,har->bhnr", features, hashing.weight)
    clear = projections.abs() > 1e-4 * projections.abs().max()  # float32 does not settle the others
    assert clear.float().mean() > 0.99
    assert torch.equal(hashing(x)[clear], projections.sign()[clear])


def test_on_the_image_of_the_fit_width_and_mean_are_ecoformers():
    x = tokens(1, 40, seed=2)
    hashing = fitted(x)
    distances = (x[:, :, :, None] - hashing.anchors[None, :, None]).square().sum(-1)
    # A shared hash sees the samples as queries and as keys, here twice the same.
    torch.testing.assert_close(hashing.width[:, 0, 0], distances.mean((0, 2, 3)))
    kernel = ecoformer_kernel(x, hashing.anchors, hashing.width)
    torch.testing.assert_close(hashing.mean[:, 0], kernel.mean((0, 2)))
    # The anchors are tokens of the image.
    assert (distances.amin(2) < 1e-6).all()


def test_the_fit_agrees_with_the_labels_better_than_ecoformers():
    """Same anchors, kernel and labels; judged on the tokens of the fit and on others."""
    x, others = tokens(8, 40, seed=3), tokens(8, 40, seed=4)
    hashing = fitted(x)
    features = ecoformer_kernel(x, hashing.anchors, hashing.width) - hashing.mean
    weight = ecoformer_fit(features, ecoformer_labels(x))
    theirs = KSH(2, 32, codes="sign")
    theirs.load_state_dict({**hashing.state_dict(), "weight": weight})
    for samples in (x, others):
        labels = ecoformer_labels(samples)
        ours, published = agreement(hashing(samples), labels), agreement(theirs(samples), labels)
        assert published > 0.2  # as close random weights come too: those steps are small
        assert ours > published + 0.05
