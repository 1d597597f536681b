import { mutants, named } from './mutant.ts';
import { allRuleLists, replaceRules } from './rules.ts';

// Loaded before a test file: its software kernels have one rule wrong.

const mutant = [...mutants()].find((one) => named(one) === process.env.MUTANT);
if (!mutant) throw new Error(`there is no mutant ${process.env.MUTANT}`);
replaceRules(allRuleLists[mutant.list] ?? [], mutant.rules);
