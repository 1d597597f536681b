import { list } from '../format.ts';
import { type Proposal, proposals } from '../model_options.ts';
import { rangeError, shown, typeError } from '../validate.ts';

/**
 * The proposals a model was asked for.
 *
 * @throws RangeError for a name that is none: it is never ignored
 */
export function modelledProposals(names: readonly Proposal[]): ReadonlySet<Proposal> {
  if (!Array.isArray(names)) throw typeError(`model.proposals must be an array of names, got ${shown(names)}`);
  for (const name of names as readonly unknown[]) {
    if (!proposals.some((one) => one === name))
      throw rangeError(`software kernel: there is no proposal ${shown(name)}; there are ${list(proposals)}`);
  }
  if (names.includes('grant-ring') && !names.includes('in-place-conversion'))
    throw rangeError("software kernel: the proposal 'grant-ring' needs 'in-place-conversion': a grant converts a page");
  return new Set(names);
}
