"""NeDR as its released code computes it, without a trick: an oracle, and what speed is measured against.

Written from the description of the released code; every module bears its official key names, so that an official state
dict loads as it is. What costs time there costs it here: the MLP of IDRM is evaluated four times on unfolded features,
B-splines come from the Cox-de Boor recursion, DREM is built anew in every pass, and a training step computes gradients
that nobody uses and runs the depth network twice on one image. What is never called (mcc, ...) is left out.
"""

import itertools
import math

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

WIDTH = 32  # channels at half resolution, BASE_CHANNEL_NUM / 2
DENSITY, DEPTH = (0.6, 1.8), (0.2, 5.0)


def squash(x: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * (x.tanh() + 1) / 2


def conv3(a: int, b: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3, bias=bias))


# The pyramid of the removal and the depth network.


def encoder() -> nn.Module:
    net = timm.create_model("tf_efficientnet_lite3", features_only=True, out_indices=(1, 2, 3, 4), pretrained=False)
    found, blocks = nn.Module(), net.blocks
    found.layer1 = nn.Sequential(net.conv_stem, net.bn1, nn.Identity(), blocks[0], blocks[1])
    found.layer2 = nn.Sequential(blocks[2])
    found.layer3 = nn.Sequential(blocks[3], blocks[4])
    found.layer4 = nn.Sequential(blocks[5], blocks[6])
    return found


class ResidualConvUnit(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3), nn.Conv2d(c, c, 3)
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.pad(self.conv1(self.pad(x.relu())).relu())) + x


class FeatureFusionBlock(nn.Module):
    def __init__(self, c: int, out: int):
        super().__init__()
        self.out_conv = nn.Conv2d(c, out, 1)
        self.resConfUnit1, self.resConfUnit2 = ResidualConvUnit(c), ResidualConvUnit(c)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = x + self.resConfUnit1(skip)
        x = F.interpolate(self.resConfUnit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return self.out_conv(x)


def scratch() -> nn.Module:
    found = nn.Module()
    for k, a in enumerate((32, 48, 136, 384)):
        c = WIDTH * 2**k
        found.add_module(f"layer{k + 1}_rn", conv3(a, c, bias=False))
        found.add_module(f"refinenet{k + 1}", FeatureFusionBlock(c, max(WIDTH, c // 2)))
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    found.output_conv = nn.Sequential(*conv3(WIDTH, 16), up, *conv3(16, 32), nn.ReLU(), nn.Conv2d(32, 1, 1))
    return found


def decode(net: nn.Module, maps: list[Tensor]) -> Tensor:
    x = net.refinenet4(maps[3])
    return net.refinenet1(net.refinenet2(net.refinenet3(x, maps[2]), maps[1]), maps[0])


# NeDR's three modules.


class KANLinear(nn.Module):
    """Efficient-KAN's layer: the bases by recursion, (rows, in) -> (rows, out)."""

    def __init__(self, a: int, b: int):
        super().__init__()
        grid = torch.arange(-3, 9, dtype=torch.float32) * 0.4 - 1
        self.register_buffer("grid", grid.expand(a, -1).contiguous())
        self.base_weight = nn.Parameter(torch.randn(b, a) / math.sqrt(a))
        self.spline_weight = nn.Parameter(torch.randn(b, a, 8) * 0.02)
        self.spline_scaler = nn.Parameter(torch.randn(b, a) / math.sqrt(a))

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(F.silu(x), self.base_weight)
        weight = self.spline_weight * self.spline_scaler.unsqueeze(-1)
        return base + F.linear(self.bases(x).flatten(1), weight.flatten(1))

    def bases(self, x: Tensor) -> Tensor:
        g, x = self.grid, x.unsqueeze(-1)
        bases = ((x >= g[:, :-1]) & (x < g[:, 1:])).to(x.dtype)
        for k in range(1, 4):
            left = (x - g[:, : -(k + 1)]) / (g[:, k:-1] - g[:, : -(k + 1)])
            right = (g[:, k + 1 :] - x) / (g[:, k + 1 :] - g[:, 1:(-k)])
            bases = left * bases[:, :, :-1] + right * bases[:, :, 1:]
        return bases


class KANCID(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.channel_independent = nn.Module()
        self.channel_independent.dconv = nn.Conv2d(c, c, 7, padding=3, groups=c, padding_mode="reflect")
        self.channel_dependent = nn.Module()
        self.channel_dependent.fc1, self.channel_dependent.fc2 = KANLinear(c, c), KANLinear(c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel_independent.dconv(x)
        n, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(-1, c)
        rows = self.channel_dependent.fc2(F.gelu(self.channel_dependent.fc1(rows)))
        return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


class IDRM(nn.Module):
    """LIIF's local ensemble, in which query and feature coordinates are the same points."""

    def __init__(self, c: int = WIDTH):
        super().__init__()
        widths = [9 * c + 20, 256, 256, 256, c]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.imnet = nn.Module()
        self.imnet.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        features = F.unfold(x, 3, padding=1).view(n, 9 * c, h, w)
        coord = torch.stack(torch.meshgrid(*((torch.arange(s) * 2 + 1) / s - 1 for s in (h, w)), indexing="ij"), -1)
        coord = coord.view(1, -1, 2).expand(n, -1, 2).to(x.dtype)
        found, areas = [], []
        for _ in range(4):
            grid = coord.flip(-1).unsqueeze(1)
            at = F.grid_sample(features, grid, mode="nearest", align_corners=False)[:, :, 0].permute(0, 2, 1)
            relative = (coord - coord) * coord.new_tensor([h, w])
            encoded = self.encode(coord) - self.encode(coord)
            cell = coord.new_tensor([2 / h * h, 2 / w * w]).expand(n, h * w, 2)
            found.append(self.imnet.layers(torch.cat([at, relative, encoded, cell], -1)))
            areas.append((relative[..., 0] * relative[..., 1]).abs() + 1e-9)
        total = torch.stack(areas).sum(0)
        out = sum(y * (a / total).unsqueeze(-1) for y, a in zip(found, areas, strict=True))
        return out.permute(0, 2, 1).reshape(n, -1, h, w)

    @staticmethod
    def encode(p: Tensor) -> Tensor:
        waves = p.unsqueeze(-1) * (2.0 ** torch.arange(4) * math.pi)
        return torch.cat([waves.sin(), waves.cos()], -1).flatten(-2)


class DenseLayer(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        self.conv = nn.Conv2d(a, b, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(x).relu()], 1)


class RDB(nn.Module):
    def __init__(self, c: int = 64):
        super().__init__()
        self.layers = nn.Sequential(*(DenseLayer(c * (k + 1), c) for k in range(3)))
        self.lff = nn.Conv2d(4 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lff(self.layers(x))


class DREM(nn.Module):
    def __init__(self, c: int = WIDTH):
        super().__init__()
        self.conv1 = nn.Conv2d(c, 64, 5, padding=2)
        self.RDB_1, self.RDB_2 = nn.Sequential(RDB(), nn.ReLU()), nn.Sequential(RDB(), nn.ReLU())
        self.conv_block2 = nn.Sequential(nn.Conv2d(64, 64, 5, padding=2), nn.ReLU())
        self.conv2 = nn.Conv2d(64, c, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        second = self.RDB_1(first)
        return x - self.conv2(self.conv_block2(first + second + self.RDB_2(second)))


# The three generators and the discriminator.


class RemovalNet(nn.Module):
    """`net_h2c`. ``drem``: weights for the DREM that every pass builds; None: random ones, as released."""

    def __init__(self, drem: dict[str, Tensor] | None = None):
        super().__init__()
        self.pretrained, self.scratch, self.drem = encoder(), scratch(), drem
        self.cid_32, self.cid_64, self.cid_128, self.cid_256 = (KANCID(WIDTH * 2**k) for k in range(4))
        self.nrn = IDRM()
        self.final_conv_beta_1 = nn.Sequential(nn.Conv2d(600, 64, 1))
        self.final_conv_beta_2 = nn.Sequential(nn.Conv2d(64, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """J, d, beta."""
        e, s = self.pretrained, self.scratch
        m1 = e.layer1(x)
        m2 = e.layer2(m1)
        m3 = e.layer3(m2)
        m4 = e.layer4(m3)
        pooled = torch.cat([m.detach().mean((2, 3), keepdim=True) for m in (m1, m2, m3, m4)], 1)
        beta = squash(self.final_conv_beta_2(self.final_conv_beta_1(pooled)), *DENSITY)
        mixers = (self.cid_32, self.cid_64, self.cid_128, self.cid_256)
        reducers = (s.layer1_rn, s.layer2_rn, s.layer3_rn, s.layer4_rn)
        maps = [mix(reduce(m)) for m, reduce, mix in zip((m1, m2, m3, m4), reducers, mixers, strict=True)]
        drem = DREM().to(x.dtype)
        if self.drem is not None:
            drem.load_state_dict(self.drem)
        t = squash(s.output_conv(drem(self.nrn(decode(s, maps)))), 0, 1).clamp(0.05, 0.95)
        A = x.amax((2, 3), keepdim=True)
        return ((x - A) / t + A).clamp(0, 1), t.log() / -beta, beta


class DepthNet(nn.Module):
    """`net_depth`."""

    def __init__(self):
        super().__init__()
        self.pretrained, self.scratch = encoder(), scratch()

    def forward(self, x: Tensor) -> Tensor:
        e, s = self.pretrained, self.scratch
        m1 = e.layer1(x)
        m2 = e.layer2(m1)
        m3 = e.layer3(m2)
        maps = [s.layer1_rn(m1), s.layer2_rn(m2), s.layer3_rn(m3), s.layer4_rn(e.layer4(m3))]
        return squash(s.output_conv(decode(s, maps)), *DEPTH)


def block(a: int, b: int, stride: int = 1, norm: bool = True) -> nn.Sequential:
    norms = [nn.BatchNorm2d(b)] if norm else []
    return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3, stride), *norms, nn.LeakyReLU(0.2))


class Bottleneck(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.res = nn.Sequential(*block(c, c), nn.ReflectionPad2d(1), nn.Conv2d(c, c, 3), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.res(x)


class ProductionNet(nn.Module):
    """`net_c2h`."""

    def __init__(self, b: int = 32):
        super().__init__()
        self.enc_conv0, self.enc_conv1 = block(3, b // 2, norm=False), block(b // 2, b)
        self.enc_conv2, self.enc_conv3 = block(b, 2 * b, 2), block(2 * b, 4 * b, 2)
        for k in range(4):
            self.add_module(f"bottleneck{k + 1}", Bottleneck(4 * b))
        self.dec_conv1, self.dec_conv2 = block(8 * b, 2 * b), block(4 * b, b, norm=False)
        self.dec_conv_last, self.dec_conv_last_2 = block(2 * b, b, norm=False), block(b, 3, norm=False)

    def forward(self, clear: Tensor, d: Tensor, beta: Tensor) -> Tensor:
        A, t = clear.amax((2, 3), keepdim=True), torch.exp(-d * beta)
        hazy = t * clear + A * (1 - t)
        x1 = self.enc_conv1(self.enc_conv0(hazy))
        x2 = self.enc_conv2(x1)
        x3 = self.enc_conv3(x2)
        y = self.bottleneck4(self.bottleneck3(self.bottleneck2(self.bottleneck1(x3))))
        y = self.dec_conv1(self.double(torch.cat([y, x3], 1)))
        y = self.dec_conv2(self.double(torch.cat([y, x2], 1)))
        y = self.dec_conv_last_2(self.dec_conv_last(torch.cat([y, x1], 1)))
        return ((2 * hazy - 1 + y.tanh()).clamp(-1, 1) + 1) / 2

    @staticmethod
    def double(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        widths, strides = [3, 64, 128, 256, 512, 1], [2, 2, 2, 1, 1]
        for k in range(5):
            conv = spectral_norm(nn.Conv2d(widths[k], widths[k + 1], 4, strides[k], 1, bias=False))
            self.add_module(f"conv{k + 1}", nn.Sequential(conv, *([nn.LeakyReLU(0.2)] if k < 4 else [])))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv5(self.conv4(self.conv3(self.conv2(self.conv1(x))))).sigmoid()


class ReferenceTraining(nn.Module):
    """Adversarial training: all five networks by their official names, their three optimisers, and one step of them."""

    def __init__(self, drem: dict[str, Tensor] | None = None):
        super().__init__()
        self.net_h2c, self.net_c2h, self.net_depth = RemovalNet(drem), ProductionNet(), DepthNet()
        self.discriminator_h2c, self.discriminator_c2h = Discriminator(), Discriminator()
        generators = [*self.net_h2c.parameters(), *self.net_c2h.parameters()]
        discriminators = [*self.discriminator_h2c.parameters(), *self.discriminator_c2h.parameters()]
        self.gen = torch.optim.Adam(generators, 1e-4, (0.9, 0.999))
        self.dis = torch.optim.Adam(discriminators, 1e-5, (0.9, 0.999))
        self.depth = torch.optim.Adam(self.net_depth.parameters(), 1e-4, (0.9, 0.999))

    def step(self, hazy: Tensor, clear: Tensor, beta: Tensor) -> dict[str, Tensor]:
        """One step with random densities ``beta`` (N,1,1,1); returns the loss terms."""
        for optimiser in (self.gen, self.dis, self.depth):
            optimiser.zero_grad()
        J, d, beta_h = self.net_h2c(hazy)
        rehazed = self.net_c2h(J, self.net_depth(J), beta_h)
        synthetic = self.net_c2h(clear, self.net_depth(clear), beta)
        J2, _, beta2 = self.net_h2c(synthetic)

        pairs = (self.discriminator_h2c, clear, J), (self.discriminator_c2h, hazy, synthetic)
        dis = sum((lsgan(net(real), 1) + lsgan(net(fake.detach()), 0)) / 2 for net, real, fake in pairs)
        dis.backward()
        self.dis.step()

        terms = {"gan": (lsgan(self.discriminator_h2c(J), 1) + lsgan(self.discriminator_c2h(synthetic), 1)) / 2}
        terms |= {"cycle_clear": F.l1_loss(J2, clear), "cycle_hazy": F.l1_loss(rehazed, hazy)}
        terms |= {"density": F.mse_loss(beta2, beta)}
        gen = 0.2 * terms["gan"] + terms["cycle_clear"] + terms["cycle_hazy"] + terms["density"]
        gen.backward()
        self.gen.step()

        self.depth.zero_grad()
        terms["pseudo_depth"] = F.l1_loss(d.detach(), self.net_depth(J.detach()))
        terms["pseudo_depth"].backward()
        self.depth.step()
        return {name: term.detach() for name, term in terms.items()} | {"discriminators": dis.detach()}


def lsgan(scores: Tensor, target: float) -> Tensor:
    return F.mse_loss(scores, torch.full_like(scores, target))
