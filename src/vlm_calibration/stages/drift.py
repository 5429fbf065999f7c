"""What responses to a query have in common, held where the reference has it while their confidences are pushed apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_calibration.data.pairs import Candidate
from vlm_calibration.models.shared_prefix import ResponseScores


def logp_drift(
    found: ResponseScores, reference: ResponseScores, compared: Sequence[Sequence[Candidate]]
) -> Tensor:
    """Squared change, since the reference, of the log-likelihood of what responses share; a mean over queries.

    That is the answer before the confidence, and the ending behind it ("%", the end of the turn), whose squared changes are
    averaged over a query's responses. A preference between confidences says nothing of either. Yet it can be met by making
    the ending of what is rejected unlikely, and what makes a number likely behind the answer does so in the answer's
    place as well: the first leaves numbers without their "%", the second answers that are numbers.
    """
    answer, ending = torch.zeros(found.tokens.shape), torch.zeros(found.tokens.shape)
    for row, candidates in enumerate(compared):
        answer[row, 0, : candidates[0].answer_length] = 1
        for k, candidate in enumerate(candidates):
            length = len(candidate.tokens)
            ending[row, k, length - candidate.ending_length : length] = 1
    # The reference may have scored longer responses beside these.
    change = found.log_likelihood - reference.log_likelihood[..., : answer.shape[-1]]
    count = torch.tensor([len(candidates) for candidates in compared]).to(change)
    answers, endings = ((change * part.to(change)).sum(-1).square() for part in (answer, ending))
    return (answers[:, 0] + endings.sum(-1) / count).mean()
