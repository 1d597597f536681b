import { list } from '../format.ts';
import { type Proposal, proposals } from '../model_options.ts';
import { rangeError, shown, typeError } from '../validate.ts';

/** The proposals that the software kernel carries out. */
const modelled: readonly Proposal[] = [
  'in-place-conversion',
  'large-folios',
  'guest-seal',
  'write-population',
  'special-mapping',
  'grant-ring',
  'memslot-lock',
  'link',
];

/**
 * The proposals a model was asked for.
 *
 * @throws RangeError for a name that is none, and for one that the software kernel does not play: neither is ever ignored
 */
export function modelledProposals(names: readonly Proposal[]): ReadonlySet<Proposal> {
  if (!Array.isArray(names)) throw typeError(`model.proposals must be an array of names, got ${shown(names)}`);
  for (const name of names as readonly unknown[]) {
    const known = proposals.find((one) => one === name);
    if (known === undefined)
      throw rangeError(`software kernel: there is no proposal ${shown(name)}; there are ${list(proposals)}`);
    if (!modelled.includes(known))
      throw rangeError(`software kernel: the proposal '${known}' is not there; these are: ${list(modelled)}`);
  }
  if (names.includes('grant-ring') && !names.includes('in-place-conversion'))
    throw rangeError("software kernel: the proposal 'grant-ring' needs 'in-place-conversion': a grant converts a page");
  return new Set(names);
}
