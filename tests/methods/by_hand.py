"""The equations of the training-free methods in plain NumPy, float64: loops and no tricks, apart from the library."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attention(q, k, v, edit=lambda row, head, logits: logits):
    """Attend, (b, n, h, d): row by row, head by head."""
    out = np.zeros_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            logits = q[row, :, head] @ k[row, :, head].T / np.sqrt(q.shape[3])
            out[row, :, head] = softmax(edit(row, head, logits)) @ v[row, :, head]
    return out


# DenseDiffusion


def nearest_down(mask, shape):
    """Shrink (h, w) taking the source index floor(i in / out)."""
    h, w = shape
    out = np.zeros(shape, mask.dtype)
    for i in range(h):
        for j in range(w):
            out[i, j] = mask[i * mask.shape[0] // h, j * mask.shape[1] // w]
    return out


def token_map(caption, phrases, masks):
    """Each token's map (s, h, w): that of the last phrase whose first occurrence covers it."""
    maps = np.zeros((len(caption), *masks[0].shape))
    for phrase, mask in zip(phrases, masks, strict=True):
        for start in range(len(caption) - len(phrase) + 1):
            if phrase and caption[start : start + len(phrase)] == phrase:
                maps[start : start + len(phrase)] = mask
                break
    return maps


def dense_logits(logits, masks, tokens, weight, kappa, t, kind):
    """Modulate the (n, s) logits of one row and head; masks (m, n) and tokens' maps (s, n) at this resolution."""
    n = logits.shape[0]
    shared = masks.T @ masks  # counts both segments of a pixel in two
    region = shared > 0 if kind == "self" else tokens.T > 0
    area = 1 - kappa * shared.sum(1) / n
    strength = weight * (t / 1000) ** 5 * area
    out = logits.copy()
    for i in range(n):
        high, low = logits[i].max(), logits[i].min()
        for j in range(logits.shape[1]):
            if region[i, j]:
                out[i, j] += strength[i] * (high - logits[i, j])
            else:
                out[i, j] -= strength[i] * (logits[i, j] - low)
    return out


# StyleAligned


def adain(x, ref, eps=1e-5):
    """(n, d) tokens of one row and head."""
    std, std_ref = (np.sqrt(y.var(0, ddof=1) + eps) for y in (x, ref))
    return std_ref * (x - x.mean(0)) / std + ref.mean(0)


def shared_attention(q, k, v, scale=1.0, shift=0.0):
    """One group, (m, n, h, d), the first row its reference."""
    out = np.zeros_like(q)
    n, d = q.shape[1], q.shape[3]
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            qr, kr = adain(q[row, :, head], q[0, :, head]), adain(k[row, :, head], k[0, :, head])
            eta = 1.0 if row == 0 else scale
            keys = np.concatenate([kr, eta * adain(k[0, :, head], k[0, :, head])])
            logits = qr @ keys.T / np.sqrt(d)
            logits[:, n:] += shift
            out[row, :, head] = softmax(logits) @ np.concatenate([v[row, :, head], v[0, :, head]])
    return out


def full_attention(q, k, v):
    """One group: every token sees those of all images."""
    m, n, h, d = q.shape
    keys, values = (np.broadcast_to(x.reshape(1, m * n, h, d), (m, m * n, h, d)) for x in (k, v))
    return attention(q, keys, values)


def pooled_moments(x, ref, groups):
    """Mean and variance by group of (h, w, c) and its reference, joined along the height."""
    both = np.concatenate([x, ref], 0).reshape(-1, groups, x.shape[-1] // groups)
    return both.mean((0, 2)), both.var((0, 2))


# StyleID


def injected(q, q_content, k_style, v_style, gamma, temperature):
    mixed = gamma * q_content + (1 - gamma) * q
    return attention(temperature * mixed, k_style, v_style)


def adain_noise(content, style):
    """(h, w, c)."""
    out = np.zeros_like(content)
    for c in range(content.shape[-1]):
        z, s = content[..., c], style[..., c]
        out[..., c] = s.std(ddof=1) * (z - z.mean()) / z.std(ddof=1) + s.mean()
    return out


def ddim_move(x, eps, a, b):
    return np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps


def inversion(eps_fn, x, labels, levels):
    """All states of an inversion: eps is asked for at (state, label)."""
    states = [x]
    for i, label in enumerate(labels):
        states.append(ddim_move(states[-1], eps_fn(states[-1], label), levels[i], levels[i + 1]))
    return np.stack(states)


# Composable Diffusion


def composed(u, conds, weights, s):
    """One image's guided noise from its unconditional and (k, ...) conditional predictions."""
    eps = u.copy()
    for c, w in zip(conds, weights, strict=True):
        eps += s * w * (c - u)
    return eps


def rescaled(eps, cond, share):
    return share * eps * cond.std() / eps.std() + (1 - share) * eps


# MagicFusion


def blur(plane):
    """4 x 4 average, stride 1, one zero around, then bilinear back to (h, w)."""
    h, w = plane.shape
    padded = np.pad(plane, 1)
    small = np.zeros((h - 1, w - 1))
    for i in range(h - 1):
        for j in range(w - 1):
            small[i, j] = padded[i : i + 4, j : j + 4].sum() / 16
    return bilinear(bilinear(small, h).T, w).T


def bilinear(x, size):
    """Resize the first axis, half-pixel centres, edges held."""
    out = np.zeros((size, x.shape[1]))
    for i in range(size):
        place = min(max((i + 0.5) * x.shape[0] / size - 0.5, 0), x.shape[0] - 1)
        low = int(np.floor(place))
        high = min(low + 1, x.shape[0] - 1)
        out[i] = (1 - (place - low)) * x[low] + (place - low) * x[high]
    return out


def saliency(difference):
    """(h, w, c)."""
    return np.mean([blur(np.abs(difference[..., c])) for c in range(difference.shape[-1])], 0)


def snb(u_g, c_g, u_e, c_e, s, k_g, k_e, own_uncond=False):
    """One image's blended noise and mask."""
    general = k_g * saliency(s * (c_g - u_g))
    expert = k_e * saliency(s * (c_e - (u_e if own_uncond else u_g)))
    omega = [softmax(x.reshape(1, -1)).reshape(x.shape) for x in (general, expert)]
    mask = omega[1] > omega[0]
    eps_g, eps_e = u_g + s * (c_g - u_g), u_e + s * (c_e - u_e)
    return np.where(mask[..., None], eps_e, eps_g), mask, omega


# Paint-with-words


def corners(mask, shape):
    """Resize (h, w) bilinearly, corner on corner."""
    out = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            y = i * (mask.shape[0] - 1) / max(shape[0] - 1, 1)
            x = j * (mask.shape[1] - 1) / max(shape[1] - 1, 1)
            for a in range(mask.shape[0]):
                for b in range(mask.shape[1]):
                    out[i, j] += max(0, 1 - abs(y - a)) * max(0, 1 - abs(x - b)) * mask[a, b]
    return out


def painted_attention(q, k, v, region, c, sigma, by="max"):
    """One image, (n, h, d) queries and (s, h, d) keys: W of its region (n, s) is added before the 1 / sqrt(d)."""
    out, d = np.zeros_like(q), q.shape[-1]
    scores = np.stack([q[:, head] @ k[:, head].T for head in range(q.shape[1])])
    measure = scores.max() if by == "max" else scores.std(ddof=1)
    for head in range(q.shape[1]):
        w = c * np.log(1 + sigma) * measure * region
        out[:, head] = softmax((scores[head] + w) / np.sqrt(d)) @ v[:, head]
    return out


# Structured Diffusion


def structured_attention(q, k, context, spans, project):
    """One image: the mean over the full prompt and each span, spliced into it, of attention with the same keys.

    ``spans`` are (first token, states (m, d)) of each phrase alone, ``project`` makes values (s, h, d).
    """
    contexts = [context]
    for start, states in spans:
        spliced = context.copy()
        spliced[start : start + len(states)] = states
        contexts.append(spliced)
    each = [attention(q[None], k[None], project(one)[None])[0] for one in contexts]
    return sum(each) / len(each)
